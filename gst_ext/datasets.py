"""Data sets."""
import math
import collections
import io
import pathlib
import zlib

import os

import numpy as np
import torch
import torch.nn.functional as F

CROP_PADDING = 4

from .errors import UserError, check, first_line, warn_once
from .rundir import lock_directory, write_atomically

EXIF_ORIENTATION = 0x0112
CIFAR = ("cifar10", "cifar100")
BUILT_IN = (*CIFAR, "digits")

# +--------------------------------------------------------------------------------------------------------------------+
# | Arrays and images of others' making                                                                                |
# +--------------------------------------------------------------------------------------------------------------------+

def read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise UserError(f"{path} cannot be read as .npz ({first_line(error)}): make it again, or delete it if it came from "
                        "a download") from None


def read_image(path, notes):
    """An image as it is to be seen, (32, 32, 3) uint8; UserError where it cannot be read or its pixels have no range.

    It is turned as its EXIF orientation says; 16 bits are scaled to 8; what is transparent lies on white. notes (a
    Counter) counts such images.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as file:
            several, turned = getattr(file, "n_frames", 1) > 1, file.getexif().get(EXIF_ORIENTATION, 1) != 1
            file.load()
            tags = getattr(file, "tag_v2", {})  # of a TIFF: bits of a pixel, and whether 0 is black
            wide = (file.format, file.mode) in (("PNG", "I"), ("PPM", "I")) or file.mode.startswith("I;16") and (
                file.format != "TIFF" or (tags.get(258), tags.get(262)) == ((16,), 1))
            image = ImageOps.exif_transpose(file)
    except Exception:  # Pillow has many for a damaged file
        raise UserError(f"{path} is not a readable image: repair or remove it") from None
    clear = "transparency" in image.info or image.mode in ("LA", "PA", "RGBA")
    check(image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr") or wide and not clear,
            f"{path} has pixels whose range, colours or transparency are not defined here (mode {image.mode}): save it "
            "as an 8-bit PNG")
    if wide:
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if clear:
        image = image.convert("RGBA")
        clear = image.getextrema()[3][0] < 255
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    for happened, what in ((several, "read to their first frame"), (turned, "turned as their EXIF data say"),
                           (wide, "scaled from 16 bits to 8"), (clear, "with transparency laid on white"),
                           (image.mode == "CMYK", "converted from CMYK")):
        notes[what] += happened
    return np.asarray(image.convert("RGB").resize((32, 32), Image.BILINEAR))


def read_image_folder(folder):
    """The images of folder/train/<class>/ and folder/test/<class>/; what was made of them is said in one line."""
    def seen(path):
        return sorted(p for p in path.glob("*") if not p.name.startswith("."))  # .ipynb_checkpoints is no class

    classes, notes = [p.name for p in seen(folder / "train") if p.is_dir()], collections.Counter()
    unknown = {p.name for p in seen(folder / "test") if p.is_dir()} - set(classes)
    check(classes, f"{folder}/train has no class folders: lay the images out as train/<class>/<image>")
    check(not unknown, f"{folder}/test/{min(unknown, default='')} is no class of {folder}/train: rename or remove it")
    data = {"classes": np.array(classes)}
    for split in ("train", "test"):
        found = [(path, label) for label, name in enumerate(classes) for path in seen(folder / split / name)]
        for label in set(range(len(classes))) - {label for _, label in found}:
            raise UserError(f"{folder}/{split}/{classes[label]} has no images: put some there, or remove the class")
        notes["beside the class folders left out"] += sum(not p.is_dir() for p in seen(folder / split))
        data[f"{split}_x"] = np.stack([read_image(path, notes) for path, _ in found])
        data[f"{split}_y"] = np.array([label for _, label in found], np.int64)
    if +notes:
        warn_once(f"train.py: images of {folder}: " + ", ".join(f"{n} {what}" for what, n in (+notes).items()))
    return data


def download_cifar(name, data_dir):
    try:
        import torchvision
        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        train, test = (kind(data_dir, train=flag, download=True) for flag in (True, False))
    except Exception as error:
        raise UserError(f"cannot download {name} ({first_line(error)}): put {name}.npz into {data_dir}/, or the official "
                        f"cifar-{name[5:]}-python.tar.gz, or use --dataset digits, which needs no download") from None
    return dict(train_x=train.data, train_y=np.array(train.targets), test_x=test.data, test_y=np.array(test.targets),
                classes=np.array(train.classes))


def checked_arrays(path, data):
    """A data set's arrays (train.load_data), labels as int64; UserError, which names path, for what does not fit."""
    missing = [k for k in ("train_x", "train_y", "test_x", "test_y", "classes") if k not in data]
    check(not missing, f"{path} lacks {', '.join(missing)}: it needs train_x, train_y, test_x, test_y and classes")
    k = len(data["classes"]) if data["classes"].ndim == 1 else 0
    check(k >= 2, f"{path}: classes must be a list of at least two names")
    for split in ("train", "test"):
        x, y = data[f"{split}_x"], data[f"{split}_y"]
        check(x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3 and min(x.shape[1:3]) >= 32,
                f"{path}: {split}_x is {x.dtype} {x.shape}; it must be uint8 (n, height, width, 3), at least 32x32")
        check(len(x) > 0 and y.shape == (len(x),) and y.dtype.kind in "iu",
                f"{path}: {split}_y is {y.dtype} {y.shape}; it must hold one whole number for each of {len(x)} images")
        check(0 <= y.min() and y.max() < k,
                f"{path}: {split}_y goes from {y.min()} to {y.max()}; the labels of {k} classes are 0 to {k - 1}")
        data[f"{split}_y"] = y.astype(np.int64)
    check(data["train_x"].shape[1:] == data["test_x"].shape[1:], f"{path}: training and test images differ in size")
    return data


def load_digits():
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, as 32x32 in three equal channels: 1,000 train, 797 test."""
    import sklearn.datasets
    from PIL import Image
    digits = sklearn.datasets.load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    x = np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.BILINEAR)) for image in grey])
    x = np.repeat(x[..., None], 3, axis=3)
    order = np.random.RandomState(0).permutation(len(x))  # one split for everybody: the bundled order is by writer
    train, test = order[:1000], order[1000:]
    return dict(train_x=x[train], train_y=digits.target[train], test_x=x[test], test_y=digits.target[test],
                classes=digits.target_names.astype(str))


def dataset_info(arrays):
    """What config.json says of a data set."""
    return {"train": len(arrays["train_x"]), "test": len(arrays["test_x"]), "classes": len(arrays["classes"]),
            "image": list(arrays["train_x"].shape[1:]),
            "crc32": {k: zlib.crc32(np.ascontiguousarray(arrays[k])) for k in sorted(arrays) if k != "classes"}}


def dataset_path(name, data_dir):
    """The file or folder of a data set; digits have none."""
    return pathlib.Path(data_dir, f"{name}.npz") if name in CIFAR else pathlib.Path(name)


def load_dataset(name, data_dir="data"):
    """Loads a data set by name or path, checked.

    name: "cifar10", "cifar100" (read from data_dir/<name>.npz; downloaded by torchvision and cached there the first
    time), "digits" (scikit-learn's), the path of a .npz of the same form, or of a folder with train/ and test/, each
    with one folder of images per class (resized to 32x32). Returns a dict: train_x, test_x (n, height, width, 3)
    uint8; train_y, test_y (n,) int64, 0 … k-1; classes (k,) str. Raises UserError if that cannot be had.
    """
    path = dataset_path(name, data_dir)
    if name in CIFAR:
        if not path.exists():
            with lock_directory(path.parent):
                if not path.exists():
                    buffer = io.BytesIO()
                    np.savez(buffer, **download_cifar(name, data_dir))
                    write_atomically(path, buffer.getbuffer())
    elif name != "digits":
        check(path.is_dir() or path.suffix == ".npz" and path.exists(),
                f"--dataset {name}: no such thing; give cifar10, cifar100, digits, a .npz file, or a folder with "
                "train/ and test/ class folders of images")
    read = read_image_folder if path.is_dir() else read_npz
    return checked_arrays(path, load_digits() if name == "digits" else read(path))
def disjoint_subsets(n, *counts):
    """Returns disjoint ascending indices into n images, of these counts, always the same."""
    order, bounds = np.random.RandomState(0).permutation(n), np.cumsum([0, *counts])
    return [np.sort(order[start:end]) for start, end in zip(bounds, bounds[1:])]


def prepare_data(arrays, device, *, val_split=0, train_images=0, test_images=0, label_noise=0.0,
                 augment=False):
    """Splits the arrays of datasets.load_dataset and moves them to the device.

    Subsets and label noise do not depend on the seed: all runs share their images.

    Returns:
        A dict: "train", "test" and, with a validation set, "val": (images (n, h, w, 3) uint8,
        labels (n,) int64); "mean" and "std" (3,): the training images' channel statistics, of
        uint8 pixels; with augment "padded", the training images with a border.
    """
    train_x, train_y, test_x, test_y = (arrays[k] for k in
                                        ("train_x", "train_y", "test_x", "test_y"))
    available = len(train_x) - val_split
    check(available > 0, f"--val-split {val_split} leaves none of {len(train_x)} images: give fewer")
    for name, wanted, there in (("train", train_images, available),
                                ("test", test_images, len(test_x))):
        check(wanted <= there, f"--{name}-images {wanted}, but there are {there}: give fewer")
    splits = {"test": (test_x, test_y)}
    if "val_x" in arrays and not val_split:
        splits["val"] = arrays["val_x"], arrays["val_y"]
    if test_images:
        index, = disjoint_subsets(len(test_x), test_images)
        splits["test"] = (test_x[index], test_y[index])
    if val_split or train_images:
        val_index, index = disjoint_subsets(len(train_x), val_split, train_images or available)
        if val_split:
            splits["val"] = (train_x[val_index], train_y[val_index])
        train_x, train_y = train_x[index], train_y[index]
    if label_noise:
        random, train_y = np.random.RandomState(1), train_y.copy()
        noisy = random.permutation(len(train_y))[:math.floor(label_noise * len(train_y) + 0.5)]
        train_y[noisy] = random.randint(len(arrays["classes"]), size=len(noisy))
    splits["train"] = (train_x, train_y)
    # Histograms give the mean and the variance exactly, whatever the number of images.
    histograms = np.stack([np.bincount(train_x[..., c].ravel(), minlength=256) for c in range(3)])
    frequencies = histograms / train_x[..., 0].size
    mean = frequencies @ np.arange(256)
    variance = frequencies @ np.arange(256) ** 2 - mean**2
    check(variance.min() > 1e-9,
          "the training images are constant in one channel: nothing can be learnt from it")
    data = {name: tuple(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in split)
            for name, split in splits.items()}
    if augment:
        data["padded"] = F.pad(data["train"][0], (0, 0, *[CROP_PADDING] * 4))
    return data | {name: torch.tensor(value, dtype=torch.float32, device=device)
                   for name, value in (("mean", mean), ("std", np.sqrt(variance)))}


def normalise(images, data):
    """Normalises uint8 images (n, h, w, 3) to float32 (n, 3, h, w) in channels-last memory."""
    return ((images.float() - data["mean"]) / data["std"]).permute(0, 3, 1, 2)


def draw_crops(n, generator):
    """Draws crop offsets (2, n) in 0 … 8 and flips (n,) for one epoch, on the CPU."""
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (2, n), generator=generator)
    return offsets, torch.randint(0, 2, (n,), generator=generator).bool()


def crop_and_flip(padded, index, offsets, flips):
    """Crops images `index` (b,) of `padded` (n, h+8, w+8, 3) to (h, w), and mirrors some.

    Args:
        offsets: (2, b), the upper left corner of each crop.
        flips: (b,) bool, the images to mirror.
    """
    height, width = (size - 2 * CROP_PADDING for size in padded.shape[1:3])
    rows = offsets[0][:, None] + torch.arange(height, device=padded.device)
    columns = torch.arange(width, device=padded.device).expand(len(index), width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + offsets[1][:, None]
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def dataset_label(dataset):
    """Names a data set in paths: by the last part of its path, distinct from the built-in names."""
    if dataset in BUILT_IN:
        return dataset
    name = os.path.basename(os.path.abspath(dataset))
    return f"own-{name}" if name.lower() in ("", *BUILT_IN) else name
