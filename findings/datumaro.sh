#!/usr/bin/env bash
# What datumaro writes of CIFAR-10 as it is distributed, in batches of Python pickles.
# Versions: datumaro 1.13.12, opencv-python-headless 4.13.0.92, Pillow 13.0.0.
# Expected by memory: images exported as a folder or as other batches have the pixels they had.
# Seen: red and blue are swapped, in every format, without a word (data are kept as BGR, and the
#   batches' RGB is taken for it); and the folder has JPEGs unless image_ext=".png" is given. Only
#   batches to batches gives back the pixels. A folder of PNGs becomes swapped batches.
# Run: PYTHON=python bash findings/datumaro.sh   (a Python with requirements.txt)
set -euo pipefail
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$temporary/site" \
    datumaro==1.13.12 attrs==26.1.0 cachetools==7.0.0 defusedxml==0.7.1 imagesize==2.0.1 \
    json-stream==2.5.1 json-stream-rs-tokenizer==0.5.4 lxml==6.1.3 \
    opencv-python-headless==4.13.0.92 orjson==3.13.0 pandas==2.3.3 pyarrow==25.0.1 \
    pycocotools==2.0.11 pytz==2026.6 PyYAML==6.0.4 ruamel.yaml==0.19.1 shapely==2.2.0 tqdm==4.70.1
cd "$temporary"
PYTHONPATH=$temporary/site "${PYTHON:-python3}" -W ignore - <<'END_OF_PYTHON'
import numpy as np, pathlib, pickle
from datumaro import Dataset
from PIL import Image

# Smooth images, red on the left and blue below, so that JPEG changes them little.
x = np.zeros((20, 32, 32, 3), np.uint8)
x[..., 0] = np.linspace(250, 0, 32).astype(np.uint8)
x[..., 2] = np.linspace(0, 120, 32).astype(np.uint8)[:, None]
x[..., 1] = (np.arange(20) * 10)[:, None, None]
labels = (np.arange(20) % 2).tolist()

pathlib.Path("cifar-10-batches-py").mkdir()
for name, content in (
        ("batches.meta", {"label_names": ["cat", "dog"], "num_vis": 3072}),
        ("test_batch", {"data": x.transpose(0, 3, 1, 2).reshape(20, -1), "labels": labels,
                        "filenames": [f"{i}.png" for i in range(20)]})):
    pathlib.Path("cifar-10-batches-py", name).write_bytes(pickle.dumps(content))
for i, image in enumerate(x):
    path = pathlib.Path("pngs", "test", ("cat", "dog")[labels[i]], f"{i}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)

def export(source, source_format, target_format, name, **options):
    dataset = Dataset.import_from(source, source_format)
    dataset.export(name, target_format, save_media=True, **options)

def read_folder(name, ending):
    paths = sorted(pathlib.Path(name).rglob(f"*{ending}"), key=lambda path: int(path.stem))
    assert [path.parent.name for path in paths] == [("cat", "dog")[label] for label in labels]
    return np.stack([np.asarray(Image.open(path)) for path in paths])

def read_batch(path):
    content = pickle.loads(pathlib.Path(path).read_bytes())
    order = np.argsort([int(pathlib.Path(name.split(":")[-1]).stem)
                        for name in content["filenames"]])
    data = np.stack([np.asarray(image, np.uint8) for image in content["data"]])[order]
    return data.reshape(20, 3, 32, 32).transpose(0, 2, 3, 1)

folders = "imagenet_with_subset_dirs"
export("cifar-10-batches-py", "cifar", folders, "a")
export("cifar-10-batches-py", "cifar", folders, "b", image_ext=".png")
export("cifar-10-batches-py", "cifar", "cifar", "c")
export("pngs", folders, folders, "d")
export("pngs", folders, "cifar", "e")
found = {"batches to a folder": read_folder("a", ".jpg"),
         "batches to PNGs": read_folder("b", ".png"),
         "batches to batches": read_batch("c/test_batch"),
         "PNGs to a folder": read_folder("d", ".png"), "PNGs to batches": read_batch("e/test")}
errors = {way: [int(abs(images.astype(int) - truth).max()) for truth in (x, x[..., ::-1])]
          for way, images in found.items()}
for way, (error, error_if_swapped) in errors.items():
    print(f"{way}: off by up to {error}, with red and blue swapped by {error_if_swapped}")
assert errors["batches to a folder"][0] > 200 and 0 < errors["batches to a folder"][1] < 60
for way in ("batches to PNGs", "PNGs to batches"):
    assert errors[way][0] > 200 and errors[way][1] == 0
for way in ("batches to batches", "PNGs to a folder"):
    assert errors[way][0] == 0
END_OF_PYTHON
