"""Small files in the real formats of COCO, LVIS, Objects365, OpenImages and COCO results, for the detection tests."""

import json

from PIL import Image, ImageDraw

from florence_jax.curation.detection import __main__ as detection
from florence_jax.data.sources.catalog import open_source

WIDTH, HEIGHT = 96, 64
EXIF_ORIENTATION = 274


def picture(path, seed, size=(WIDTH, HEIGHT), orientation=None):
    """A JPEG of its own for each seed."""
    image = Image.new("RGB", size, (seed * 37 % 256, seed * 91 % 256, 90))
    ImageDraw.Draw(image).rectangle((10, 10, 40, 30), fill=(250, seed % 250, 10))
    exif = Image.Exif()
    if orientation:
        exif[EXIF_ORIENTATION] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", exif=exif)
    return path.read_bytes()


def dump(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return str(path)


def coco_image(number, split="train2017"):
    name = f"{number:012d}.jpg"
    return {
        "license": 3,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/{split}/{name}",
        "height": HEIGHT,
        "width": WIDTH,
        "date_captured": "2013-11-14 11:18:45",
        "flickr_url": "http://farm9.staticflickr.com/8186/x_z.jpg",
        "id": number,
    }


def coco_box(number, image, category, bbox, iscrowd=0):
    x, y, w, h = bbox
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {
        "segmentation": {"counts": [272, 2, 4], "size": [HEIGHT, WIDTH]} if iscrowd else polygon,
        "area": w * h,
        "iscrowd": iscrowd,
        "image_id": image,
        "bbox": bbox,
        "category_id": category,
        "id": number,
    }


def coco_json(images, annotations):
    return {
        "info": {"description": "COCO 2017 Dataset", "version": "1.0", "year": 2017},
        "licenses": [{"url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "id": 1, "name": "x"}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"supercategory": "person", "id": 1, "name": "person"},
            {"supercategory": "animal", "id": 18, "name": "dog"},
            {"supercategory": "furniture", "id": 63, "name": "couch"},
            {"supercategory": "electronic", "id": 74, "name": "mouse"},
        ],
    }


def lvis_image(number, negative=(), not_exhaustive=(), split="train2017"):
    return {
        "date_captured": "2013-11-18 04:53:57",
        "neg_category_ids": list(negative),
        "license": 4,
        "height": HEIGHT,
        "width": WIDTH,
        "flickr_url": "http://farm3.staticflickr.com/x_z.jpg",
        "coco_url": f"http://images.cocodataset.org/{split}/{number:012d}.jpg",
        "not_exhaustive_category_ids": list(not_exhaustive),
        "id": number,
    }


def lvis_json(images, annotations):
    def category(number, name, synonyms, synset):
        return {
            "image_count": 10,
            "synonyms": synonyms,
            "def": "a thing",
            "id": number,
            "synset": synset,
            "name": name,
            "frequency": "c",
            "instance_count": 20,
        }

    rows = [{k: v for k, v in row.items() if k != "iscrowd"} for row in annotations]
    return {
        "info": {"description": "LVIS 2020 train set.", "version": "v1.0"},
        "annotations": rows,  # LVIS has them before the images
        "images": images,
        "licenses": [],
        "categories": [
            category(1, "person", ["person", "baby", "man", "woman"], "person.n.01"),
            category(2, "dog", ["dog"], "dog.n.01"),
            category(3, "sofa", ["sofa", "couch", "lounge"], "sofa.n.01"),
            category(4, "bat_(animal)", ["bat_(animal)"], "bat.n.01"),
            category(5, "settee", ["settee", "love_seat"], "settee.n.01"),
        ],
    }


def objects365_json(images, annotations):
    return {
        "images": [
            {"height": HEIGHT, "id": i, "license": 5, "width": WIDTH, "file_name": name, "url": ""}
            for i, name in images
        ],
        "annotations": [
            {
                "id": n,
                "iscrowd": 0,
                "isfake": 0,
                "area": box[2] * box[3],
                "isreflected": 0,
                "bbox": box,
                "image_id": image,
                "category_id": category,
            }
            for n, (image, category, box) in enumerate(annotations)
        ],
        "categories": [
            {"name": "Person", "id": 1},
            {"name": "Mouse", "id": 86},
            {"name": "Dog", "id": 93},
            {"name": "Love Seat", "id": 300},
        ],
        "licenses": [{"name": "x", "id": 5, "url": ""}],
    }


BBOX_HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)


def openimages_files(folder, boxes, labels, split="train", header=BBOX_HEADER):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{i},xclick,{label},1,{x1},{x2},{y1},{y2},0,0,{group},0,0" for i, label, x1, x2, y1, y2, group in boxes]
    path = folder / f"oidv6-{split}-annotations-bbox.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    labels = [f"{i},verification,{label},{confidence}" for i, label, confidence in labels]
    (folder / f"{split}-annotations-human-imagelabels-boxable.csv").write_text(
        "\n".join(["ImageID,Source,LabelName,Confidence", *labels]) + "\n"
    )
    (folder / "class-descriptions-boxable.csv").write_text(
        '/m/01g317,Person\n/m/04yx4,Man\n/m/04rmv,Mouse\n/m/01c648,"Bat (Animal)"\n/m/0bt4r4,Dog\n/m/0jbk,Animal\n'
    )
    tree = {
        "LabelName": "/m/0bl9f",
        "Subcategory": [
            {"LabelName": "/m/01g317", "Subcategory": [{"LabelName": "/m/04yx4"}], "Part": [{"LabelName": "/m/0dzct"}]},
            {"LabelName": "/m/0jbk", "Subcategory": [{"LabelName": "/m/0bt4r4"}]},
        ],
    }
    (folder / "bbox_labels_600_hierarchy.json").write_text(json.dumps(tree))
    return str(path)


IMAGENET = ("n01440764/n01440764_10026.JPEG", "n02330245/n02330245_7.JPEG", "n01440764/n01440764_2.JPEG")


def imagenet_info(path, files=IMAGENET):
    images = [{"id": 900 + i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(files)]
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    return dump(path, {"info": {}, "images": images, "categories": categories})


RESULTS = [
    {"image_id": 900, "category_id": 18, "bbox": [1.0, 2.0, 30.0, 40.0], "score": 0.61},
    {"image_id": 900, "category_id": 1, "bbox": [40.0, 2.0, 20.0, 20.0], "score": 0.93},
    {"image_id": 900, "category_id": 1, "bbox": [0.0, 0.0, 9.0, 9.0], "score": 0.49},
    {"image_id": 901, "category_id": 18, "bbox": [5.0, 5.0, 50.0, 50.0], "score": 0.5},
    {"image_id": 902, "category_id": 18, "bbox": [5.0, 5.0, 50.0, 50.0], "score": 0.2},
    {"image_id": 12345, "category_id": 18, "bbox": [5.0, 5.0, 50.0, 50.0], "score": 0.9},
]
WORDS = "n01440764\ttench, Tinca tinca\nn02330245\tmouse\n"
OBJECTS_FILES = (
    (420917, "images/v1/patch8/objects365_v1_00420917.jpg"),
    (5, "images/v2/patch16/objects365_v2_00000005.jpg"),
)


def make_pictures(root):
    for number in (1, 2, 3):
        picture(root / f"coco/train2017/{number:012d}.jpg", number)
    picture(root / "coco/val2017/000000000139.jpg", 139)
    picture(root / "o365/train/patch8/objects365_v1_00420917.jpg", 50)
    (root / "o365/train/patch16").mkdir()
    (root / "o365/train/patch16/objects365_v2_00000005.jpg").write_bytes(
        (root / "coco/train2017/000000000002.jpg").read_bytes()
    )
    for i, name in enumerate(("000026e7ee790996", "000062a39995e348")):
        picture(root / f"oi/train/{name}.jpg", 60 + i, (200, 100))
    for i, name in enumerate(IMAGENET):
        picture(root / f"in22k/{name}", 70 + i)


def make_openimages(folder):
    """Writes two OpenImages pictures' boxes and verified labels, with unknown classes and images."""
    return openimages_files(
        folder,
        [
            ("000026e7ee790996", "/m/0bt4r4", 0.1, 0.6, 0.2, 0.8, 0),
            ("000026e7ee790996", "/m/04yx4", 0.5, 0.9, 0.0, 1.0, 1),
            ("000062a39995e348", "/m/04rmv", 0.25, 0.5, 0.25, 0.75, -1),
            ("000062a39995e348", "/m/unknown", 0.25, 0.5, 0.25, 0.75, 0),
        ],
        [
            ("000026e7ee790996", "/m/0bt4r4", 1),
            ("000026e7ee790996", "/m/04rmv", 0),
            ("000062a39995e348", "/m/0jbk", 1.0),
            ("ffffffffffffffff", "/m/0jbk", 1),
        ],
    )


def make_sets(root):
    """Writes all five sets; returns the arguments of the command for them and the places of the other files.

    Objects365's second picture is COCO's picture 2, byte for byte.
    """
    make_pictures(root)
    coco = coco_json(
        [coco_image(1), coco_image(2), coco_image(3)],
        [
            coco_box(11, 1, 18, [10.5, 10.0, 30.0, 20.0]),
            coco_box(12, 1, 1, [50.0, 5.0, 20.0, 50.0]),
            coco_box(13, 1, 1, [0.0, 0.0, 90.0, 60.0], iscrowd=1),
            coco_box(14, 2, 63, [80.0, 40.0, 40.0, 10.0]),  # reaches over the right edge
            coco_box(15, 2, 74, [5.0, 5.0, 0.0, 12.0]),  # no area
            coco_box(16, 2, 74, [200.0, 5.0, 10.0, 12.0]),  # outside
            coco_box(17, 2, 74, [10.0, 5.0, 0.4, 12.0]),  # thinner than a pixel
            coco_box(18, 404, 74, [1.0, 5.0, 5.0, 12.0]),  # no such image
        ],
    )
    lvis = lvis_json(
        [lvis_image(1, negative=[3, 4], not_exhaustive=[2]), lvis_image(2, negative=[2, 3])],
        [
            coco_box(1, 1, 2, [11.0, 10.5, 29.0, 19.5]),  # COCO's dog again
            coco_box(2, 1, 2, [70.0, 30.0, 20.0, 20.0]),  # another dog
            coco_box(3, 2, 4, [5.0, 5.0, 20.0, 20.0]),
        ],
    )
    objects = objects365_json(
        OBJECTS_FILES,
        [
            (420917, 93, [10, 10, 30.5, 20]),
            (420917, 93, [10, 10, 30.5, 20]),  # twice, as in the official file
            (420917, 1, [10, 10, 30.5, 20]),
            (5, 86, [20, 20, 10, 10]),
        ],
    )
    boxes = make_openimages(root / "oi")
    (root / "words.txt").write_text(WORDS)
    return {
        "root": root,
        "coco": f"{dump(root / 'instances_train2017.json', coco)}:{root}/coco/train2017",
        "lvis": f"{dump(root / 'lvis_v1_train.json', lvis)}:{root}/coco",
        "objects365": f"{dump(root / 'zhiyuan_objv2_train.json', objects)}:{root}/o365/train",
        "openimages": f"{boxes}:{root}/oi/train",
        "imagenet": f"{imagenet_info(root / 'image_info.json')}:{root}/in22k",
        "teacher": dump(root / "results.json", RESULTS),
        "words": str(root / "words.txt"),
    }


KINDS = ("coco", "lvis", "objects365", "openimages", "imagenet")


def command(world, out, *extra, kinds=KINDS):
    args = [f"--{kind}={world[kind]}" for kind in kinds]
    if "imagenet" in kinds:
        args += [f"--teacher={world['teacher']}", f"--imagenet_words={world['words']}", "--teacher_name=dyhead-1"]
        args += ["--teacher_classes=coco"]
    return [*args, f"--out={out}", *extra]


def run(*args):
    assert detection.main(list(map(str, args))) == 0


def fails(capsys, *args):
    assert detection.main(list(map(str, args))) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and len(message) < 900
    return message


def read(out, split="train"):
    source = open_source(str(out / split))
    return {record["key"]: record for record in (source[i] for i in range(len(source)))}


def iou(a, b):
    w, h = (min(a[2 + k], b[2 + k]) - max(a[k], b[k]) for k in (0, 1))
    if w <= 0 or h <= 0:
        return 0.0
    area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return w * h / (sum(area) - w * h)
