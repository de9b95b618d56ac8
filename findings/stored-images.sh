#!/usr/bin/env bash
# What two packages that store data sets change in labels, images and splits.
# Versions: datasets 5.2.0, pyarrow 26.0.1, litdata 0.2.76, torch 2.14.1.
# Expected by memory: whole numbers made a ClassLabel (as stratify_by_column needs it) stay what
#   they are; images that map returns are stored as they are; a file of parquet holds the images;
#   a train_test_split draws images.
# Seen: class_encode_column of datasets numbers labels in the order of strings, so that of 100
#   labels 2 becomes 12 and 10 becomes 2. An image that map's function changes in place (thumbnail,
#   paste) is stored as the unchanged file, or, where its bytes were in the data, as a JPEG again
#   if it was one. to_parquet writes the paths of images that lie in files, and no pixels. litdata's
#   train_test_split gives each split whole chunks of neighbours: of images in the order of their
#   classes, the test split has few classes, and the training split lacks one.
# Run: PYTHON=python bash findings/stored-images.sh   (a Python with requirements.txt)
set -euo pipefail
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
site=$temporary/site-packages  # the name by which dill, in datasets, knows installed packages
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0 \
    huggingface_hub==2.4.0 httpx2==2.16.2 httpcore2==2.16.2 h11==0.16.0 anyio==4.16.0 idna==3.20 \
    truststore==0.10.5 click==8.5.1 tqdm==4.70.1 PyYAML==6.0.4 litdata==0.2.76 \
    lightning-utilities==0.15.3 boto3==1.44.8 botocore==1.44.8 s3transfer==0.19.3 jmespath==1.1.0 \
    obstore==0.12.1 tifffile==2026.3.3 requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.3 \
    certifi==2026.10.19.post1
export PYTHONPATH=$site HF_HUB_OFFLINE=1 HOME=$temporary TMPDIR=$temporary
cd "$temporary"

"${PYTHON:-python3}" -W ignore - <<'END_OF_DATASETS'
import datasets, numpy as np, pandas
from PIL import Image
datasets.disable_progress_bars()
labels = datasets.Dataset.from_dict({"label": range(100)})
encoded = labels.class_encode_column("label")["label"]
print("labels 0 to 11 become", encoded[:12])
assert encoded[:12] == [0, 1, 12, 23, 34, 45, 56, 67, 78, 89, 2, 3]
assert sum(i == label for i, label in enumerate(encoded)) == 12

pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
pixels[:32] //= 8
for ending in ("png", "jpg"):
    Image.fromarray(pixels).save(f"a.{ending}")

def thumbnail(row):
    row["image"].thumbnail((32, 32))
    return row

def paste(row):
    row["image"].paste((0, 0, 255), (0, 0, 32, 32))
    return row

def resize(row):
    return {"image": row["image"].resize((32, 32))}

for ending in ("png", "jpg"):
    for inside in (False, True):
        with open(f"a.{ending}", "rb") as file:
            cell = {"bytes": file.read(), "path": None} if inside else f"a.{ending}"
        data = datasets.Dataset.from_dict({"image": [cell]}).cast_column("image", datasets.Image())
        original = np.asarray(data[0]["image"])
        for change in (thumbnail, paste, resize):
            expected = np.asarray(change({"image": Image.open(f"a.{ending}")})["image"])
            stored = np.asarray(data.map(change)[0]["image"])
            unchanged = np.array_equal(stored, original)
            right = np.array_equal(stored, expected)
            print(f"{ending}, bytes in the data {inside}, {change.__name__}:",
                  "unchanged" if unchanged else "right" if right else "encoded once more")
            assert unchanged == (change is not resize and not inside)
            assert right == (change is resize or inside and ending == "png")
    data.to_parquet("bytes.parquet")
    datasets.Dataset.from_dict({"image": [f"a.{ending}"]}).cast_column(
        "image", datasets.Image()).to_parquet("path.parquet")
    (with_bytes,), (with_path,) = (pandas.read_parquet(f"{name}.parquet")["image"]
                                   for name in ("bytes", "path"))
    assert with_bytes["bytes"] and with_path == {"bytes": None, "path": f"a.{ending}"}
END_OF_DATASETS

cat > litdata_split.py <<'END_OF_LITDATA'
import litdata
import numpy as np

def image(i):  # 32x32, in the order of 10 classes
    return {"image": np.full((32, 32, 3), i % 256, np.uint8), "label": i // 100}

if __name__ == "__main__":
    litdata.optimize(image, list(range(1000)), "store", num_workers=1, chunk_bytes="1MB")
    data = litdata.StreamingDataset("store")
    assert [row["label"] for row in data] == [i // 100 for i in range(1000)]
    train, test = litdata.train_test_split(data, [0.8, 0.2])
    counts = [np.bincount([row["label"] for row in split], minlength=10).tolist()
              for split in (train, test)]
    print("litdata: images of each class in train and test", counts)
    assert sum(counts[1]) == 200 and np.add(*counts).tolist() == [100] * 10
    assert counts[1].count(0) >= 6 and 0 in counts[0]
END_OF_LITDATA
"${PYTHON:-python3}" -W ignore litdata_split.py
