"""Questions to train on and to test on: which, how many about a picture at once, with which answers."""

from collections.abc import Iterable

import numpy as np
from ml_collections import ConfigDict

from florence_jax.data.answers import AnswerVocabulary
from florence_jax.data.records import Record, Source, sample_of
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.joined_questions import open_questions
from florence_jax.data.sources.question_groups import hold_out_pictures, picture_numbers
from florence_jax.errors import UserError

QUESTION_SCENES = "scene_questions:"
QUESTION_SPLITS = ("held_out", "new_style", "new_pairs")  # to test on where nobody names any,
TESTED_SCENES = 200  # of each so many
MOST_PLACES = 8  # questions about a picture at once, where nobody says how many
COMPOSED_LOOKED_AT = 6000  # questions of scenes, which are composed when they are asked for: they show all answers
FEW_ASKED, FEW_COUNT, MANY_COUNT = 50_000, 2, 9  # up to so many questions an answer counts from 2 of them, else from 9


class QuestionSets:
    """What `config.data` names.

    Attributes:
      train: the questions that are trained on, or None. tests: sources by name.

    Raises:
      UserError: for a source that is not there or has no questions, too few pictures to hold any out.
    """

    def __init__(self, config: ConfigDict):
        data = config.data
        self.train: Source | None = open_questions(data.train) if data.train else None
        self.tests: dict[str, Source] = {}
        specs = [spec.strip() for spec in data.test.split("|") if spec.strip()]
        if not specs and data.train.startswith(QUESTION_SCENES) and "|" not in data.train:
            options = "".join(f":{part}" for part in data.train.split(":")[3:])
            specs = [f"{QUESTION_SCENES}{split}:{TESTED_SCENES}{options}" for split in QUESTION_SPLITS]
        for spec in specs:
            name = spec.split(":")[1] if spec.startswith(QUESTION_SCENES) else "test"
            name += str(len(self.tests) + 1) if name in self.tests else ""
            self.tests[name] = open_source(spec)
        if self.train is not None and not specs:
            pictures = len(np.unique(picture_numbers(self.train)))
            count = round(config.holdout * pictures) if config.holdout < 1 else int(config.holdout)
            if not 0 < count < pictures:
                raise UserError(
                    f"config.holdout={config.holdout} of the {pictures} pictures of {self.train.name} leaves none to "
                    "train or to test on: give another share (or number), or other questions with "
                    "--config.data.test=DATA"
                )
            self.train, self.tests["test"] = hold_out_pictures(self.train, count)

    def places(self, given: int) -> int:
        """Questions about a picture at once: what is given, or if that is 0 as many as most pictures have, at most 8.

        Raises:
          UserError: for less.
        """
        if given < 0:
            raise UserError(f"config.questions_per_image={given} must be at least 1, or 0 for as many as pictures have")
        if given or self.train is None:
            return given or 1
        counts = np.bincount(picture_numbers(self.train))
        return int(min(np.quantile(counts, 0.5, method="higher"), MOST_PLACES))

    def vocabulary(self, options: ConfigDict) -> AnswerVocabulary:
        """The answers to choose from: of the file that `config.answers` names, else of the questions trained on.

        Raises:
          UserError: as `AnswerVocabulary`.
        """
        if options.file:
            return AnswerVocabulary.load(options.file)
        assert self.train is not None, "there are questions to train on"
        least = options.min_count
        if least is None:
            least = FEW_COUNT if len(self.train) <= FEW_ASKED else MANY_COUNT
        composed = self.train.name.startswith(QUESTION_SCENES)
        records: Iterable[Record] = sample_of(self.train, COMPOSED_LOOKED_AT) if composed else self.train.metadata()
        return AnswerVocabulary.build(records, least)
