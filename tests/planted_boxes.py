"""A folder of pictures with boxes in COCO's form, in which mistakes are planted, each once."""

import json

import numpy as np
from PIL import Image

NAMES = ("ant", "bee", "cat")


def picture(path, seed, size=(60, 40), mode="RGB", orientation=None):
    """A picture of its own for each seed; a .png unless the name says otherwise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
    elif mode != "RGB":
        image = image.convert(mode)
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif)


def coco(images, boxes, names=NAMES):
    """The content of a file: images (id, name, width, height), boxes (image id, class id, x, y, width, height)."""
    return {
        "images": [dict(zip(("id", "file_name", "width", "height"), image, strict=True)) for image in images],
        "annotations": [
            {"id": i, "image_id": box[0], "category_id": box[1], "bbox": list(box[2:]), "iscrowd": 0}
            for i, box in enumerate(boxes, 1)
        ],
        "categories": [{"id": 3 * i + 1, "name": name} for i, name in enumerate(names)],
    }


def write(path, content):
    """Writes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def good_folder(folder, pictures=6, seed=0):
    """Pictures with two boxes each, without a mistake."""
    images, boxes = [], []
    for i in range(pictures):
        picture(folder / f"{i}.png", seed + i)
        images.append((i, f"{i}.png", 60, 40))
        boxes += [(i, 1, 5, 5, 20, 20), (i, 4 if i % 2 else 7, 30, 10, 25, 25)]
    write(folder / "annotations.json", coco(images, boxes))
    return folder


# What is planted -> what of it is told.
PLANTED = {
    "missing_file": ("gone.png", ""),
    "unreadable": ("torn.png", ""),
    "same_picture": ("copy.png", "0.png"),
    "unused_file": ("spare.png", ""),
    "file_twice": ("1.png", "ids 1 and 31"),
    "turned": ("phone.jpg", "says 60 x 40, is 40 x 60"),
    "size_mismatch": ("other.png", "says 60 x 40, is 60 x 60"),
    "rescaled": ("small.png", "says 60 x 40, is 30 x 20"),
    "no_size": ("nosize.png", ""),
    "not_rgb": ("deep.png", ""),
    "not_finite": ("0.png", "annotations[14]"),
    "zero_area": ("0.png", "annotations[15]"),
    "outside": ("0.png", "annotations[16]"),
    "clipped": ("0.png", "annotations[17]"),
    "bad_box": ("", "annotations[18]"),
    "unknown_image": ("", "image_id 404"),
    "unknown_category": ("0.png", "category_id 99"),
    "image_id_twice": ("twin_a.png", "id 40"),
    "box_id_twice": ("", "id 1"),
    "same_box": ("2.png", "annotations[22]"),
    "thin": ("0.png", "annotations[23]"),
    "category_id_twice": ("wasp", "id 4, also 'bee'"),
    "category_name_twice": ("cat", "ids 7 and 8"),
    "names_alike": ("Ant", "and 'ant'"),
    "no_boxes": ("Ant", ""),
    "text_id": ("x9", ""),
    "thread": ("line.png", "400 x 2"),
}


def planted_folder(folder):
    """The good pictures, and each of `PLANTED`."""
    good_folder(folder, 7)
    content = json.loads((folder / "annotations.json").read_text())
    images, boxes, categories = content["images"], content["annotations"], content["categories"]

    def image(number, name, width=60, height=40):
        images.append({"id": number, "file_name": name, "width": width, "height": height})

    def box(image_id, category, *bbox, number=None):
        number = len(boxes) + 1 if number is None else number
        boxes.append({"id": number, "image_id": image_id, "category_id": category, "bbox": list(bbox)})

    box(0, 1, float("nan"), 5, 9, 9)  # 14
    box(0, 1, 5, 5, 0, 9)
    box(0, 1, 70, 5, 9, 9)
    box(0, 1, 50, 30, 40, 30)
    box(0, 1, 50, 30, 40)
    box(404, 1, 5, 5, 9, 9)
    box(0, 99, 5, 5, 9, 9)
    box(0, 1, 8, 8, 9, 9, number=1)
    box(2, 1, 5, 5, 20, 20)
    box(0, 1, 20, 20, 0.5, 9)  # 23
    for number, name in ((20, "gone.png"), (21, "torn.png"), (22, "copy.png"), (31, "1.png")):
        image(number, name)
    (folder / "torn.png").write_bytes((folder / "3.png").read_bytes()[:20])
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    picture(folder / "spare.png", 50)
    picture(folder / "phone.jpg", 51, orientation=6)
    image(23, "phone.jpg")
    box(23, 1, 10, 5, 30, 10)
    picture(folder / "other.png", 52, (60, 60))
    image(24, "other.png")
    picture(folder / "small.png", 53, (30, 20))
    image(25, "small.png")
    box(25, 1, 10, 10, 20, 20)
    picture(folder / "nosize.png", 54)
    images.append({"id": 26, "file_name": "nosize.png"})
    picture(folder / "deep.png", 55, mode="I;16")
    image(27, "deep.png")
    picture(folder / "line.png", 56, (400, 2))
    image(28, "line.png", 400, 2)
    for name in ("twin_a.png", "twin_b.png"):
        picture(folder / name, 57 + (name == "twin_b.png"))
        image(40, name)
    picture(folder / "text.png", 59)
    image("x9", "text.png")
    box("x9", 1, 5, 5, 9, 9)
    categories += [{"id": 4, "name": "wasp"}, {"id": 8, "name": "cat"}, {"id": 11, "name": "Ant"}]
    write(folder / "annotations.json", content)
    return folder
