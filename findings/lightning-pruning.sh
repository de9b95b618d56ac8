#!/usr/bin/env bash
# What becomes of a network that Lightning's ModelPruning prunes when its training is resumed.
# Version: pytorch-lightning 2.6.6, torch 2.14.1.
# Expected by memory: a run that is stopped and resumed from its checkpoint goes on as one that is
#   not: with a fraction of 0.3 of what is left, 7, 5, 3, 2 of 10 filters after 4 epochs.
# Seen: the checkpoint holds the product of weights and masks and no masks. After it is resumed,
#   training brings the filters back, and the fractions begin anew: 7, 5 and then 7, 5 are left.
#   With make_pruning_permanent=False the masks are stored, and a new run cannot load them.
# Run: PYTHON=python bash findings/lightning-pruning.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    pytorch-lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0 pyyaml==6.0.4
cd "$site"
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END'
import logging, torch
import pytorch_lightning as pl
from torch import nn

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
torch.manual_seed(0)
data = torch.utils.data.TensorDataset(torch.randn(40, 3, 8, 8), torch.arange(40) % 4)

class Network(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)
        self.layers = nn.Sequential(self.conv, nn.ReLU(), nn.Flatten(), nn.Linear(360, 4))

    def training_step(self, batch, i):
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

class Count(pl.Callback):
    def on_train_epoch_end(self, trainer, network):
        left.append(int(network.conv.weight.flatten(1).any(1).sum()))

def train(epochs, folder, resume=None, **options):
    global left
    left, network = [], Network()
    pruning = pl.callbacks.ModelPruning(
        "ln_structured", parameters_to_prune=[(network.conv, "weight")], amount=0.3,
        pruning_norm=2, pruning_dim=0, use_global_unstructured=False,
        use_lottery_ticket_hypothesis=False, **options)
    pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
               enable_model_summary=False, default_root_dir=folder, callbacks=[
                   pruning, Count(), pl.callbacks.ModelCheckpoint(folder, save_last=True)],
               ).fit(network, torch.utils.data.DataLoader(data, batch_size=20), ckpt_path=resume)
    return left
whole, begun = train(4, "whole"), train(2, "begun")
stored = torch.load("begun/last.ckpt", weights_only=False)["state_dict"]
resumed = train(4, "resumed", "begun/last.ckpt")
print(whole, begun, resumed)
assert whole == [7, 5, 3, 2] and begun == [7, 5] and resumed == [7, 5]
assert stored["conv.weight"].flatten(1).any(1).sum() == 5 and not any("mask" in k for k in stored)
train(2, "kept", make_pruning_permanent=False)
try:
    train(4, "kept", "kept/last.ckpt", make_pruning_permanent=False)
except RuntimeError as error:
    assert "Unexpected key(s)" in str(error) and "conv.weight_mask" in str(error)
else:
    raise AssertionError("masks are loaded")
END
