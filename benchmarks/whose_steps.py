"""Which of the sampler's steps lose a picture: a student's wrong pictures drawn again, with some steps its teacher's.

    PYTHONPATH=src python benchmarks/whose_steps.py STUDENT TEACHER -n 1600 --tag two_object --tag color_attr --out DIR

The student (a model folder) draws prompts of split dev and GenEval's rules judge them. Each picture that is wrong is
drawn again from the same noise in several ways: a letter for each step says whose velocity moves it, S the student's
or T the teacher's. Printed is how many are right then; DIR gets the pictures. A hundred pictures take a minute on a
CPU core, the teacher's several.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from linocut.eval.arms import Arm, Field
from linocut.eval.prompts import seed_of
from linocut.eval.rules import GENEVAL_TASKS, judge
from linocut.eval.world_detector import SHIPPED, WorldDetector
from linocut.train.prompts import sample_prompts

STUDENT, TEACHER = "S", "T"


@dataclass(frozen=True)
class Case:
    """A picture to draw: GenEval's entry of its prompt, and which of the prompt's pictures it is."""

    entry: dict[str, Any]
    image: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("-n", "--count", type=int, default=553, help="prompts, of which those of --tag are drawn")
    parser.add_argument("--images", type=int, default=2, help="of each prompt")
    parser.add_argument("--tag", action="append", choices=GENEVAL_TASKS, help="repeatable; default: all tasks")
    parser.add_argument("--ways", nargs="+", help="letters for all steps, as in TTSSSSSS; default: the teacher's two "
                                                  "at a time, the first half, all")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures")
    given = parser.parse_args()
    fields = {STUDENT: Field(Arm("student", given.student)), TEACHER: Field(Arm("teacher", given.teacher))}
    detector, steps = WorldDetector(SHIPPED), len(fields[STUDENT].levels) - 1
    cases = [Case(entry, image) for entry in sample_prompts("dev", given.count)
             if entry["tag"] in (given.tag or GENEVAL_TASKS) for image in range(given.images)]
    wrong = [case for case, right, _ in judged(fields, detector, cases, STUDENT * steps) if not right]
    print(f"{len(wrong)} of {len(cases)} pictures are wrong", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    for way in given.ways or ways(steps):
        count = 0
        for number, (_, right, picture) in enumerate(judged(fields, detector, wrong, way)):
            picture.save(given.out / f"{number:03d}.{way}.png")
            count += right
        print(f"{way}  {count} are right", flush=True)


def ways(steps: int) -> list[str]:
    """Two steps at a time the teacher's, then the first half, then all."""
    taken = [range(start, min(start + 2, steps)) for start in range(0, steps, 2)] + [range(steps // 2), range(steps)]
    return ["".join(TEACHER if step in each else STUDENT for step in range(steps)) for each in taken]


def judged(fields: Mapping[str, Field], detector: WorldDetector, cases: Sequence[Case],
           way: str) -> Iterator[tuple[Case, bool, Image]]:
    """Each case, whether its picture is right when it is drawn this way, and the picture."""
    levels = fields[STUDENT].levels
    if len(way) != len(levels) - 1 or set(way) - set(fields):
        raise SystemExit(f"{way!r} is to have S or T for each of {len(levels) - 1} steps")
    for case in cases:
        prompt = case.entry["prompt"]
        texts = {letter: fields[letter].read([prompt]) for letter in set(way)}
        x = fields[STUDENT].noise([seed_of(prompt, case.image)])
        for step, letter in enumerate(way):
            x = x + (levels[step + 1] - levels[step]) * fields[letter].velocity(x, texts[letter], step)
        picture = fields[STUDENT].pictures(x)[0]
        sight = detector.look([picture])[0]
        yield case, judge(case.entry, sight.found, sight.colours, detector.thresholds).correct, picture


if __name__ == "__main__":
    main()
