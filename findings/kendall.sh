#!/usr/bin/env bash
# What torchmetrics calls Kendall's tau-a where values are tied, such as the retrain period of runs.
# Version: torchmetrics 1.9.0, scipy 1.17.1, torch 2.14.1.
# Expected by memory: tau-a is (concordant - discordant) / all pairs, so that ties lower it; of six
#   runs with one setting and six with another that all end higher, 36 / 66 = 0.545.
# Seen: variant "a" divides by the pairs without ties, which is Goodman and Kruskal's gamma (its
#   documentation gives this formula): 1. Tied runs count for nothing, and it exceeds tau-b (0.739)
#   where tau-a never does. Variants "b", the default, and "c" are SciPy's.
# Run: PYTHON=python bash findings/kendall.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    torchmetrics==1.9.0 lightning-utilities==0.15.3
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END'
import itertools, scipy.stats, torch
from torchmetrics.functional import kendall_rank_corrcoef

settings = torch.tensor([4.0] * 6 + [40.0] * 6)
examples = {"separated": torch.arange(12.0), "mixed": torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3,
                                                                    5, 8])}
for name, accuracies in examples.items():
    signs = [int(torch.sign(settings[i] - settings[j]) * torch.sign(accuracies[i] - accuracies[j]))
             for i, j in itertools.combinations(range(12), 2)]
    tau_a, gamma = sum(signs) / len(signs), sum(signs) / sum(map(abs, signs))
    found = {v: kendall_rank_corrcoef(settings, accuracies, variant=v).item() for v in "abc"}
    print(name, "tau-a", tau_a, "gamma", gamma, "torchmetrics", found)
    assert abs(found["a"] - gamma) < 1e-6 and abs(gamma) > 1.5 * abs(tau_a)
    for variant in "bc":
        theirs = scipy.stats.kendalltau(settings, accuracies, variant=variant).statistic
        assert abs(found[variant] - theirs) < 1e-6
    assert found["a"] > found["b"] > tau_a
    if name == "separated":
        assert found["a"] == 1 and round(tau_a, 3) == 0.545 and round(found["b"], 3) == 0.739
END
