"""Image data sets as checked arrays: CIFAR, scikit-learn's digits, .npz files, folders of images.

docs/data.md describes what is accepted. What was converted, resized, left out or found twice is
one line on stderr; data that cannot be used are a UserError.
"""
import collections
import io
import math
import os
import pathlib
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from .errors import UserError, check, first_line, warn_once
from .rundir import lock_directory, write_atomically

CIFAR = ("cifar10", "cifar100")
BUILT_IN = (*CIFAR, "digits")
ARRAYS = ("train_x", "train_y", "test_x", "test_y", "classes")
SIZE = 32  # height and width that the images of a folder are resized to
CROP_PADDING = 4
EXIF_ORIENTATION = 0x0112
TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC = 258, 262  # photometric 1: black is 0


def dataset_path(name, data_dir):
    """Returns the path of a data set's file or folder (which "digits" do not have)."""
    return pathlib.Path(data_dir, f"{name}.npz") if name in CIFAR else pathlib.Path(name)


def dataset_label(dataset):
    """Names a data set in paths: by the last part of its path, distinct from the built-in names."""
    if dataset in BUILT_IN:
        return dataset
    name = os.path.basename(os.path.abspath(dataset))
    return f"own-{name}" if name.lower() in ("", *BUILT_IN) else name


def load_dataset(name, data_dir="data"):
    """Loads a data set by name or path and checks it.

    Args:
        name: "cifar10" or "cifar100" (data_dir/<name>.npz, which torchvision's download makes the
            first time), "digits" (scikit-learn's), or the path of a .npz file or of a folder.
        data_dir: The folder of CIFAR's files.

    Returns:
        A dict of train_x, test_x (n, height, width, 3) uint8; train_y, test_y (n,) int64 from 0 to
        k - 1; classes (k,) str; and val_x, val_y where the data have a validation split.

    Raises:
        UserError: The data are missing or cannot be used.
    """
    path = dataset_path(name, data_dir)
    if name == "digits":
        return check_arrays(name, load_digits())
    if name in CIFAR:
        download_once(name, path)
    check(path.exists(), f"--dataset {name}: no such file or folder; give cifar10, cifar100, "
          "digits, a .npz file, or a folder of images")
    if path.is_dir():
        return check_arrays(path, read_image_folder(path))
    check(path.suffix == ".npz", f"--dataset {name}: the file's name ends in "
          f"{path.suffix or 'nothing'} and not in .npz; give a .npz file with {', '.join(ARRAYS)} "
          "(docs/data.md shows how to make one)")
    return check_arrays(path, read_npz(path))


def dataset_info(arrays):
    """Returns what config.json says of a data set: its sizes, and checksums of its arrays."""
    counts = {split: len(arrays[f"{split}_x"]) for split in splits_of(arrays)}
    return {**counts, "classes": len(arrays["classes"]),
            "image": list(arrays["train_x"].shape[1:]),
            "crc32": {name: zlib.crc32(np.ascontiguousarray(arrays[name]))
                      for name in sorted(arrays) if name != "classes"}}


# Checks

def splits_of(arrays):
    """Returns the names of the splits that a dict of arrays has."""
    return ["train", "test"] + ["val"] * ("val_x" in arrays or "val_y" in arrays)


def check_arrays(source, arrays):
    """Checks a data set's arrays; returns them with labels as int64. `source` begins messages."""
    needed = [*ARRAYS, *["val_x", "val_y"] * ("val" in splits_of(arrays))]
    missing = [name for name in needed if name not in arrays]
    check(not missing, f"{source} lacks {', '.join(missing)} and holds {list_names(arrays)}: "
          f"{', '.join(needed)} are needed (docs/data.md shows how to make them)")
    unused = [name for name in arrays if name not in needed]
    if unused:
        warn_once(f"{source}: not used: {list_names(unused)}; used: {', '.join(needed)}")
    k = len(arrays["classes"]) if arrays["classes"].ndim == 1 else 0
    check(k >= 2, f"{source}: classes must be a list of at least two names")
    for split in splits_of(arrays):
        x, y = arrays[f"{split}_x"], arrays[f"{split}_y"]
        check(x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3 and min(x.shape[1:3]) >= 32,
              f"{source}: {split}_x is {x.dtype} {x.shape}; it must be uint8 (n, height, width, "
              "3), at least 32x32")
        check(x.shape[1:] == arrays["train_x"].shape[1:],
              f"{source}: {split}_x and train_x differ in the size of their images")
        check(len(x) > 0 and y.shape == (len(x),) and y.dtype.kind in "iu",
              f"{source}: {split}_y is {y.dtype} {y.shape}; it must hold one whole number for "
              f"each of {len(x)} images")
        check(0 <= y.min() and y.max() < k, f"{source}: {split}_y goes from {y.min()} to "
              f"{y.max()}; the labels of {k} classes are 0 to {k - 1}")
        check_pixel_range(x, f"{source}: {split}_x")
        arrays[f"{split}_y"] = y.astype(np.int64)
    check_training_classes(arrays["train_y"], k, source)
    warn_of_shared_images(arrays, source)
    return arrays


def check_pixel_range(images, where):
    """Refuses images without shades, warns of dark ones.

    Images scaled to 0..1, to -1..1 or to deviation 1 keep only values next to 0, or next to 256
    where negative ones wrap around, when they are cast to bytes. Black and white (0 and 255) pass.
    """
    if not any(((image > 3) & (image < 252)).any() for image in images):
        values = np.unique(images).tolist()
        check(values == [0, 255], f"{where} has only the pixels {', '.join(map(str, values))}; "
              "0 to 255 is expected: scale them before the cast to uint8")
    brightest = images.max()
    if brightest < 64:
        warn_once(f"{where}: the brightest pixel is {brightest}; 0 to 255 is expected, in all "
                  "splits alike")


def check_training_classes(labels, num_classes, where):
    """Warns of classes without training images; `where` begins the line."""
    empty = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if len(empty):
        warn_once(f"{where}: {len(empty)} of {num_classes} classes have no training images "
                  f"(labels {list_names(empty)}): the network cannot learn them")


def warn_of_shared_images(arrays, source):
    """Warns of images that lie in two splits, which are found by a 64-bit hash of their pixels."""
    hashes = {split: [hash(image.tobytes()) for image in arrays[f"{split}_x"]]
              for split in splits_of(arrays)}
    for first, second in (("train", "test"), ("train", "val"), ("test", "val")):
        known, others = set(hashes[first]), hashes.get(second, [])
        count = sum(value in known for value in others)
        if count:
            warn_once(f"{source}: {count} of {len(others)} images of {second}_x are exact copies "
                      f"of images of {first}_x")


def list_names(names):
    """Returns at most five names, and how many more there are, for a message."""
    names = list(map(str, names))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more or "nothing"


# Sources

def read_npz(path):
    """Returns the arrays of a .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise UserError(f"{path} cannot be read as .npz ({first_line(error)}): make it again, or "
                        "delete it if it came from a download") from None


def download_once(name, path):
    """Downloads CIFAR to `path` unless it is there; other processes wait for the same download."""
    if path.exists():
        return
    with lock_directory(path.parent, wait=True):
        if not path.exists():
            buffer = io.BytesIO()
            np.savez(buffer, **download_cifar(name, path.parent))
            write_atomically(path, buffer.getbuffer())


def download_cifar(name, data_dir):
    """Returns CIFAR's arrays, as torchvision downloads them."""
    try:
        import torchvision
        kind = getattr(torchvision.datasets, name.upper())
        train, test = (kind(data_dir, train=flag, download=True) for flag in (True, False))
    except Exception as error:
        raise UserError(f"cannot download {name} ({first_line(error)}): put {name}.npz into "
                        f"{data_dir}/, or the official cifar-{name[5:]}-python.tar.gz, or use "
                        "--dataset digits, which needs no download") from None
    return dict(train_x=train.data, train_y=np.array(train.targets), test_x=test.data,
                test_y=np.array(test.targets), classes=np.array(train.classes))


def load_digits():
    """Returns scikit-learn's 1,797 digits, 8x8 grey, as 32x32 with three equal channels.

    A fixed permutation chooses 1,000 to train and 797 to test, since their order is by writer.
    """
    import sklearn.datasets
    from PIL import Image
    digits = sklearn.datasets.load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    x = np.stack([np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.BILINEAR))
                  for image in grey])
    x = np.repeat(x[..., None], 3, axis=3)
    order = np.random.RandomState(0).permutation(len(x))
    train, test = order[:1000], order[1000:]
    return dict(train_x=x[train], train_y=digits.target[train], test_x=x[test],
                test_y=digits.target[test], classes=digits.target_names.astype(str))


# Folders of images

def read_image_folder(folder):
    """Returns the arrays of train/<class>/<image> and test/, val/ or valid/ of the same form."""
    entries = list_entries(folder)
    held_out = [name for name in ("test", "val", "valid") if folder / name in entries]
    train = folder / "train"
    classes = [path.name for path in list_entries(train) if path.is_dir()]
    for place, complete in ((train if train in entries else folder, classes), (folder, held_out)):
        check(complete, f"{place} holds {list_names(path.name for path in list_entries(place))}; "
              "needed: train/<class>/<image> and test/<class>/<image> (or val/ or valid/)")
    check(held_out[-2:] != ["val", "valid"], f"{folder} has val/ and valid/: keep one of them")
    if held_out[0] != "test":
        warn_once(f"{folder} has no test/: {held_out[0]}/ is the test split")
    places = {"train": train, **dict(zip(("test", "val"), (folder / name for name in held_out)))}
    unread = [path.name for path in entries if path.is_dir() and path not in places.values()]

    images, notes, sizes = {}, collections.Counter(), collections.Counter()
    for split, place in places.items():
        for path in list_entries(place):
            check(path.name in classes or not path.is_dir(), f"{path} is not one of the classes "
                  f"in {train}: lay the images out as {place.name}/<class>/<image>, or remove it")
            notes["beside the class folders left out"] += not path.is_dir()
        images[split] = [list_class_images(place / name, notes) for name in classes]
    arrays = {"classes": np.array(classes)}
    for split, by_class in images.items():
        arrays[f"{split}_x"] = np.stack([read_image(path, notes, sizes)
                                         for paths in by_class for path in paths])
        arrays[f"{split}_y"] = np.repeat(np.arange(len(classes)), list(map(len, by_class)))

    lines = [f"{count} {what}" for what, count in notes.items() if count]
    del sizes[SIZE, SIZE]
    if sizes:
        listed = (f"{count} of {height}x{width}" for (height, width), count in sizes.most_common())
        squashed = sum(count for (height, width), count in sizes.items() if height != width)
        lines.append(f"{sizes.total()} resized to {SIZE}x{SIZE} ({list_names(listed)}), {squashed} "
                     "of them squashed to a square")
    if unread:
        lines.append(f"folders not read: {list_names(unread)}")
    if lines:
        warn_once(f"images of {folder}: {', '.join(lines)}")
    return arrays


def list_entries(folder):
    """Returns a folder's entries in order, without hidden ones such as .ipynb_checkpoints."""
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def list_class_images(folder, notes):
    """Returns the image files of a class folder, or of images/ in it (as in Tiny ImageNet)."""
    found = list_entries(folder)
    if folder / "images" in found:
        notes["beside images/ left out"] += len(found) - 1
        folder = folder / "images"
        found = list_entries(folder)
    check(found, f"{folder} has no images: put some there, or remove the class")
    for path in found:
        check(not path.is_dir(), f"{path} is a folder: move its images to {folder}, or remove it")
    return found


def read_image(path, notes, sizes):
    """Returns an image as (SIZE, SIZE, 3) uint8; Counters count conversions and original sizes.

    The image is turned as its EXIF orientation says, 16 bits are scaled to 8, and what is
    transparent lies on white. Pixels whose range is not defined are refused.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as file:
            several_frames = getattr(file, "n_frames", 1) > 1
            turned = file.getexif().get(EXIF_ORIENTATION, 1) != 1
            file.load()
            tags = getattr(file, "tag_v2", {})
            full_range = file.format != "TIFF" or (
                tags.get(TIFF_BITS_PER_SAMPLE), tags.get(TIFF_PHOTOMETRIC)) == ((16,), 1)
            is_16_bit = (file.format, file.mode) in (("PNG", "I"), ("PPM", "I")) or (
                file.mode.startswith("I;16") and full_range)
            image = ImageOps.exif_transpose(file)
    except Exception:  # Pillow has many for a damaged file
        raise UserError(f"{path} is not a readable image: repair or remove it") from None
    transparent = "transparency" in image.info or image.mode in ("LA", "PA", "RGBA")
    known_modes = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
    check(image.mode in known_modes or is_16_bit and not transparent,
          f"{path} has pixels whose range, colours or transparency are not defined here (mode "
          f"{image.mode}): save it as an 8-bit PNG")
    if is_16_bit:
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if transparent:
        image = image.convert("RGBA")
        transparent = image.getextrema()[3][0] < 255
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    for happened, what in ((several_frames, "read to their first frame"),
                           (turned, "turned as their EXIF data say"),
                           (is_16_bit, "scaled from 16 bits to 8"),
                           (transparent, "with transparency laid on white"),
                           (image.mode == "CMYK", "converted from CMYK")):
        notes[what] += happened
    sizes[image.height, image.width] += 1
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.BILINEAR))


# On the device

def disjoint_subsets(n, *counts):
    """Returns disjoint ascending indices into n images, of these counts, always the same."""
    order, bounds = np.random.RandomState(0).permutation(n), np.cumsum([0, *counts])
    return [np.sort(order[start:end]) for start, end in zip(bounds, bounds[1:])]


def prepare_data(arrays, device, *, val_split=0, train_images=0, test_images=0, label_noise=0.0,
                 augment=False):
    """Splits the arrays of load_dataset and moves them to the device.

    Subsets and label noise do not depend on the seed: all runs share their images.

    Returns:
        A dict: "train", "test" and, with a validation set, "val": (images (n, h, w, 3) uint8,
        labels (n,) int64); "mean" and "std" (3,): the training images' channel statistics, of
        uint8 pixels; with augment "padded", the training images with a border.
    """
    num_train, num_test = len(arrays["train_x"]), len(arrays["test_x"])
    available = num_train - val_split
    check(available > 0, f"--val-split {val_split} leaves none of {num_train} images: give fewer")
    for name, wanted, there in (("train", train_images, available),
                                ("test", test_images, num_test)):
        check(wanted <= there, f"--{name}-images {wanted}, but there are {there}: give fewer")

    def subset(split, index):
        x, y = arrays[f"{split}_x"], arrays[f"{split}_y"]
        return (x, y) if len(index) == len(x) else (x[index], y[index])  # no copy of all

    test_index, = disjoint_subsets(num_test, test_images or num_test)
    val_index, train_index = disjoint_subsets(num_train, val_split, train_images or available)
    train_x, train_y = subset("train", train_index)
    if len(train_y) < num_train:
        check_training_classes(train_y, len(arrays["classes"]), "--train-images and --val-split "
                               f"leave {len(train_y)} images")
    if label_noise:
        random, train_y = np.random.RandomState(1), train_y.copy()
        noisy = random.permutation(len(train_y))[:math.floor(label_noise * len(train_y) + 0.5)]
        train_y[noisy] = random.randint(len(arrays["classes"]), size=len(noisy))
    splits = {"train": (train_x, train_y), "test": subset("test", test_index)}
    if val_split:
        splits["val"] = subset("train", val_index)
    elif "val_x" in arrays:
        splits["val"] = arrays["val_x"], arrays["val_y"]
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
