"""Caption files of the two formats that have several names per image."""

KARPATHY = {
    "images": [
        {
            "cocoid": 391895,
            "imgid": 0,
            "filename": "COCO_val2014_000000391895.jpg",
            "split": "test",
            "sentences": [{"raw": "A man on a bike.", "tokens": ["a", "man"]}, {"tokens": ["a", "bike"]}],
        },
        {"cocoid": 7, "imgid": 1, "filename": "seven.jpg", "split": "val", "sentences": [{"raw": "A cat."}]},
        {"cocoid": 8, "imgid": 2, "filename": "eight.jpg", "split": "restval", "sentences": [{"raw": "A dog."}]},
    ],
    "dataset": "coco",
}
COCO = {
    "info": {},
    "images": [{"id": 1, "file_name": "one.jpg"}, {"id": 2, "file_name": "two.jpg"}, {"id": 3, "file_name": "three.jpg"}],
    "annotations": [
        {"id": 90, "image_id": 1, "caption": "A cat."},
        {"id": 91, "image_id": 2, "caption": "A dog."},
        {"id": 92, "image_id": 1, "caption": "Cat."},
    ],
}
