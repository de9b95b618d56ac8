#!/usr/bin/env bash
# How strong imagecorruptions' corruptions are on images of CIFAR's size.
# Versions: imagecorruptions 1.1.2, opencv-python-headless 4.13.0.92.
# Expected by memory: severity 1 to 5 of a 32x32 image is that of CIFAR-10-C, whose Gaussian noise
#   has deviations 0.04, 0.06, 0.08, 0.09 and 0.10 of the range (Hendrycks and Dietterich's
#   make_cifar_c.py).
# Seen: it is that of ImageNet-C at every size: 0.08, 0.12, 0.18, 0.26 and 0.38, so that its
#   severity 1 is CIFAR-10-C's 3. Fog and glass blur raise errors with NumPy 2 and scikit-image
#   0.26.
# Run: PYTHON=python bash findings/imagecorruptions.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    imagecorruptions==1.1.2 opencv-python-headless==4.13.0.92 numba==0.68.1 llvmlite==0.50.0 \
    scikit-image==0.26.0 imageio==2.38.1 lazy-loader==0.6 tifffile==2026.3.3 setuptools==80.10.2
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END_OF_PYTHON'
import imagecorruptions, numpy as np
np.random.seed(0)
grey = np.full((32, 32, 3), 128, np.uint8)

def corrupt(name, severity):
    return imagecorruptions.corrupt(grey, corruption_name=name, severity=severity).astype(float)

found = []
for severity in range(1, 6):  # quartiles, since the strongest noise is cut off at 0 and 255
    quartiles = np.percentile(np.concatenate([corrupt("gaussian_noise", severity)
                                              for _ in range(20)]), [25, 75])
    found.append(np.diff(quartiles)[0] / 255 / (2 * 0.6745))
print("deviations of the noise", np.round(found, 3))
assert np.allclose(found, [0.08, 0.12, 0.18, 0.26, 0.38], rtol=0.05)
for name in ("fog", "glass_blur"):
    try:
        corrupt(name, 1)
    except (AttributeError, TypeError) as error:
        print(f"{name}: {error}")
    else:
        raise AssertionError(f"{name} works now")
END_OF_PYTHON
