"""Writes questions about composed scenes as a folder of pictures and questions.jsonl, as one's own questions are.

    python -m florence_jax.tools.build_questions --out=asked
    python -m florence_jax.tools.build_questions --out=few --train=30 --held_out=10 --each=2

Training needs no files: `--config.data.train=scene_questions:train` makes the same questions when they are asked for,
see `florence_jax.data.sources.scene_questions`. Each split is a folder, OUT/SPLIT, which is data for
`--config.data.train` as it is, and what `florence_jax.predict --input=OUT/SPLIT/questions.jsonl` answers. With `--each`
a picture has so many of the six questions, of other types from picture to picture. The same options write the same
bytes on any machine with the same backgrounds.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from florence_jax.command_line import enter, exit_code
from florence_jax.data.coco_folder import claim_folder, stored_png
from florence_jax.data.sources.backgrounds import BACKGROUNDS, choose_backgrounds
from florence_jax.data.sources.scene_content import CONTENT_SIDE, CONTENT_SPLITS
from florence_jax.data.sources.scene_questions import SCENE_QUESTIONS, SceneQuestions
from florence_jax.errors import UserError
from florence_jax.files import with_home, write_bytes, write_text

QUESTIONS_MARKER = "scene_questions.json"  # of what a folder holds, in it
ASKED_OF = {"train": 1000, "held_out": 100, "new_style": 100, "new_pairs": 100}  # scenes, unless the options say others
LINE = ("question", "answers", "question_id", "question_type", "answer_type")


def build_questions(out: Path, sources: Mapping[str, SceneQuestions], each: int = len(SCENE_QUESTIONS)) -> None:
    """Writes each source as the folder of that name in `out`.

    Args:
      out: folder.
      sources: by the names of their splits.
      each: questions a picture.

    Raises:
      UserError: if `out` holds anything else than these questions.
    """
    claim_folder(out, QUESTIONS_MARKER, {split: source.name for split, source in sources.items()} | {"each": each})
    # Whoever passes the pictures on passes this on too.
    shutil.copyfile(str(files("florence_jax.data") / "emoji/licenses/NOTICE.txt"), out / "NOTICE.txt")
    for split, source in sources.items():
        (out / split).mkdir(exist_ok=True)
        write_text(out / split / "questions.jsonl", "".join(_lines(out / split, source, each)))


def _lines(folder: Path, source: SceneQuestions, each: int) -> Iterator[str]:
    """The lines of a table; writes the pictures."""
    for scene in range(len(source) // source.each):
        first, name = source.each * scene, f"{scene:06}.png"
        write_bytes(folder / name, stored_png(source[first]["image"]))
        for number in sorted((each * scene + k) % source.each for k in range(each)):
            record = source.described(first + number)
            yield json.dumps({"image": name} | {field: record[field] for field in LINE}) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a user's mistake."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a new one, or one of these questions")
    for split, count in ASKED_OF.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"scenes of this split, {count} unless given")
    most = len(SCENE_QUESTIONS)
    parser.add_argument("--each", type=int, default=most, help=f"questions a scene, 1 to {most}")
    parser.add_argument("--side", type=int, default=CONTENT_SIDE, help="pixels of a side")
    parser.add_argument("--backgrounds", choices=BACKGROUNDS, default="", help="photographs, where they are installed")

    def work() -> None:
        args = parser.parse_args(with_home(argv))
        if not 1 <= args.each <= most:
            raise UserError(f"--each={args.each}: a scene has 1 to {most} questions")
        end = f"{args.side}:{choose_backgrounds(args.backgrounds)}"
        counts = {split: getattr(args, split) for split in CONTENT_SPLITS}
        sources = {
            split: SceneQuestions(f"scene_questions:{split}:{count}:{end}") for split, count in counts.items() if count
        }
        if not sources:
            raise UserError("no questions to write: give a count above 0")
        build_questions(args.out, sources, args.each)
        for split, source in sources.items():
            scenes = len(source) // source.each
            print(f"{args.out / split}: {scenes:,} pictures, {args.each} questions each; {source.summary['says']}")

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
