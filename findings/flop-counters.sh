#!/usr/bin/env bash
# What FLOP counters count for the CIFAR VGG11, 152,769,536 multiply-adds by hand.
# Versions: fvcore 0.1.5.post20221221, thop 0.1.1.post2209072238, ptflops 0.7.5, torchinfo 1.8.0,
#   torch 2.14.1.
# Expected by memory: fvcore and thop add batch norm, 2 for each of its 151,552 outputs; ptflops
#   adds biases, batch norm, ReLU and pools; torchinfo and torch count the convolutions and the
#   linear layer only, torch 2 for each multiply-add.
# Seen: thop adds 4 for each output of batch norm. ptflops counts a ReLU or pool that is a layer
#   twice, as the layer and as the function that it calls; its aten backend adds the biases alone.
#   torchinfo adds the biases, for each position, and batch norm's parameters.
# Run: PYTHON=python bash findings/flop-counters.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    fvcore==0.1.5.post20221221 iopath==0.1.10 yacs==0.1.8 portalocker==4.4.2 tabulate==0.10.0 \
    termcolor==3.3.0 thop==0.1.1.post2209072238 ptflops==0.7.5 torchinfo==1.8.0
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END'
import fvcore.nn, ptflops, thop, torch, torchinfo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

layers, c_in = [], 3
for c in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
    if c == "pool":
        layers.append(nn.MaxPool2d(2))
    else:
        layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()]
        c_in = c
model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(c_in, 10)).eval()
x, size = torch.zeros(1, 3, 32, 32), (3, 32, 32)

def pt(backend):
    return int(ptflops.get_model_complexity_info(model, size, backend=backend, as_strings=False,
                                                 print_per_layer_stat=False)[0])
with torch.no_grad(), FlopCounterMode(display=False) as counter:
    model(x)
found = {
    "fvcore": fvcore.nn.FlopCountAnalysis(model, x).unsupported_ops_warnings(False).total(),
    "torchinfo": torchinfo.summary(model, (1, *size), verbose=0).total_mult_adds,
    "torch": counter.get_total_flops(), "ptflops": pt("pytorch"), "ptflops aten": pt("aten"),
    "thop": int(thop.profile(model, (x,), verbose=False)[0])}
print(found)
hand, maps, pooled, bn_parameters = 152_769_536, 151_552, 124_928, 2 * 2752
assert found == {
    "fvcore": hand + 2 * maps, "thop": hand + 4 * maps, "torch": 2 * hand,
    "ptflops": hand + maps + 10 + 2 * maps + 2 * (maps + pooled),  # bias, batch norm, ReLU, pool
    "ptflops aten": hand + maps + 10, "torchinfo": hand + maps + 10 + bn_parameters}
END
