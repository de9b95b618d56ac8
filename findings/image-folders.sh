#!/usr/bin/env bash
# Which images and labels other packages find in folders of train/<class>/ and test/<class>/.
# Versions: timm 1.0.31, datasets 5.2.0, fastai 2.8.12, keras 3.15.1 with grain 0.2.18,
#   torch 2.14.1.
# Expected by memory: a split that is not there is an error or test/; what lies in test/ is not
#   trained on; a validation split has images of every class, none of them trained on; labels are
#   numbered by the classes' names as strings, as torchvision, this project and datasets do it.
# Seen: without val/, timm's split "validation", which its train.py takes, is train/ and test/
#   together, and so is any other name that is no folder; it sorts names by the numbers in them and
#   without regard to case. datasets puts the test images of a class called "train", as CIFAR-100
#   and COCO have it, into both splits; where class folders lie side by side, it reads that one
#   alone. fastai with valid_pct trains on images of test/. Keras' validation_split with
#   shuffle=False is the last classes, mostly trained on if the training split is shuffled.
# Run: PYTHON=python bash findings/image-folders.sh   (a Python with requirements.txt)
set -euo pipefail
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
site=$temporary/site-packages  # the name by which dill, in datasets, knows installed packages
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    timm==1.0.31 safetensors==0.8.0 datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 dill==0.4.1 \
    multiprocess==0.70.19 xxhash==4.1.0 huggingface_hub==2.4.0 httpx2==2.16.2 httpcore2==2.16.2 \
    h11==0.16.0 anyio==4.16.0 idna==3.20 truststore==0.10.5 click==8.5.1 tqdm==4.70.1 \
    PyYAML==6.0.4 fastai==2.8.12 fastcore==2.2.41 fastprogress==1.0.3 fasttransform==0.0.5 \
    fastdownload==0.0.8 plum-dispatch==2.10.1 beartype==0.23.1 keras==3.15.1 grain==0.2.18 \
    array-record==0.8.6 etils==1.15.0 importlib_resources==7.1.0 zipp==4.1.2 portpicker==1.6.0 \
    psutil==7.2.2 absl-py==2.5.1 h5py==3.16.0 optree==0.20.0 ml_dtypes==0.6.0 namex==0.1.0 \
    rich==15.0.0 markdown-it-py==4.3.0 mdurl==0.1.2 protobuf==7.36.2 requests==2.34.2 \
    urllib3==2.8.0 charset-normalizer==3.5.3 certifi==2026.10.19.post1
export PYTHONPATH=$site HF_HUB_OFFLINE=1 HOME=$temporary KERAS_BACKEND=torch
cd "$temporary"

"${PYTHON:-python3}" -W ignore - <<'END_OF_IMAGES'
import numpy as np, pathlib
from PIL import Image
random = np.random.default_rng(0)
for split, count in (("both/train", 10), ("both/test", 5), ("alone", 10)):
    for name in ("10", "2", "Zebra", "cat", "train"):
        folder = pathlib.Path(split, name)
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
END_OF_IMAGES

"${PYTHON:-python3}" -W ignore - <<'END_OF_TIMM'
import timm.data, torchvision
found = {split: timm.data.create_dataset("", "both", split=split)
         for split in ("train", "test", "validation", "tset")}
print("timm", {split: len(images) for split, images in found.items()})
assert [len(images) for images in found.values()] == [50, 25, 75, 75]
assert list(found["train"].reader.class_to_idx) == ["2", "10", "cat", "train", "Zebra"]
classes = torchvision.datasets.ImageFolder("both/train").classes
assert classes == ["10", "2", "Zebra", "cat", "train"]
END_OF_TIMM

"${PYTHON:-python3}" -W ignore - <<'END_OF_DATASETS'
import datasets, numpy as np
datasets.disable_progress_bars()
splits = datasets.load_dataset("imagefolder", data_dir="both")
counts = {split: np.bincount(images["label"]).tolist() for split, images in splits.items()}
print("datasets", splits["train"].features["label"].names, counts)
assert splits["train"].features["label"].names == ["10", "2", "Zebra", "cat", "train"]
assert counts == {"train": [10, 10, 10, 10, 15], "test": [5] * 5}
pixels = {split: [np.asarray(image).tobytes() for image in images["image"]]
          for split, images in splits.items()}
assert len(set(pixels["train"]) & set(pixels["test"])) == 5
alone = datasets.load_dataset("imagefolder", data_dir="alone")
assert alone.num_rows == {"train": 10} and alone["train"].column_names == ["image"]
END_OF_DATASETS

"${PYTHON:-python3}" -W ignore - <<'END_OF_FASTAI'
from fastai.vision.all import ImageDataLoaders
loaders = ImageDataLoaders.from_folder("both", valid_pct=0.2, seed=1, bs=5, num_workers=0)
trained = [path.parts[-3] for path in loaders.train_ds.items]
print("fastai trains on images of", {split: trained.count(split) for split in ("train", "test")})
assert len(trained) == 60 and len(loaders.valid_ds) == 15 and trained.count("test") >= 10
END_OF_FASTAI

"${PYTHON:-python3}" -W ignore - <<'END_OF_KERAS'
import keras, numpy as np
def read(subset, **options):
    batches = list(keras.utils.image_dataset_from_directory(
        "alone", image_size=(32, 32), validation_split=0.2, subset=subset, format="grain",
        verbose=False, **options))
    return ({np.asarray(image).tobytes() for images, _ in batches for image in images},
            np.bincount(np.concatenate([np.asarray(labels) for _, labels in batches]), minlength=5))
trained, _ = read("training", seed=1)
for options in ({"shuffle": False}, {"seed": 1}):
    images, counts = read("validation", **options)
    print("keras, validation by", options, counts, "trained on", len(images & trained))
    assert len(images) == 10 and (len(images & trained) >= 6) == ("shuffle" in options)
    assert (counts.tolist() == [0, 0, 0, 0, 10]) == ("shuffle" in options)
_, counts = read("training", shuffle=False)
assert counts.tolist() == [10, 10, 10, 10, 0]
END_OF_KERAS
