"""Which of the sampler's steps lose a picture: a student's wrong pictures drawn again, with some steps its teacher's.

    PYTHONPATH=src python benchmarks/whose_steps.py STUDENT TEACHER -n 1600 --tag two_object --tag color_attr --out DIR

The student draws prompts of split dev and GenEval's rules judge them. Each picture that is wrong is drawn again from
the same noise in several ways: a letter for each step says whose velocity moves it, S the student's or T the teacher's.
Printed is how many are right then; `DIR/cases.json` says which, beside the pictures, numbered as there. Wrong pictures
are near the edge of being right, and some will be whatever is changed: another student in the teacher's place is the
control. A hundred pictures take a minute on a CPU core, the teacher's several.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    """A picture to draw: GenEval's entry of its prompt, which of the prompt's pictures it is, and the ways in which it
    is right."""

    entry: dict[str, Any]
    image: int
    right: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="model folder")
    parser.add_argument("teacher", help="model folder, or that of another student")
    parser.add_argument("-n", "--count", type=int, default=553, help="prompts, of which those of --tag are drawn")
    parser.add_argument("--images", type=int, default=2, help="of each prompt")
    parser.add_argument("--tag", action="append", choices=GENEVAL_TASKS, help="repeatable; default: all tasks")
    parser.add_argument("--ways", nargs="+", help="S or T for each step, as in TTSSSSSS; default: the teacher's two at "
                                                  "a time, the first half, all")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and cases.json")
    given = parser.parse_args()
    student = Arm("student", given.student)
    request = student.request
    teacher = Arm("teacher", given.teacher, width=request.width, height=request.height, steps=request.steps)
    for way in given.ways or ():
        if len(way) != request.steps or set(way) - {STUDENT, TEACHER}:
            raise SystemExit(f"{way!r} is to have S or T for each of {request.steps} steps")
    fields, detector = {STUDENT: Field(student), TEACHER: Field(teacher)}, WorldDetector(SHIPPED)
    cases = [Case(entry, image) for entry in sample_prompts("dev", given.count)
             if entry["tag"] in (given.tag or GENEVAL_TASKS) for image in range(given.images)]
    given.out.mkdir(parents=True, exist_ok=True)
    plain = STUDENT * request.steps
    wrong = [(case, picture) for case, picture in drawn(fields, detector, cases, plain) if plain not in case.right]
    print(f"{len(wrong)} of {len(cases)} pictures are wrong", flush=True)
    for number, (_, picture) in enumerate(wrong):
        picture.save(given.out / f"{number:03d}.{plain}.png")
    for way in given.ways or ways(request.steps):
        for number, (_, picture) in enumerate(drawn(fields, detector, [case for case, _ in wrong], way)):
            picture.save(given.out / f"{number:03d}.{way}.png")
        print(f"{way}  {sum(way in case.right for case, _ in wrong)} are right", flush=True)
    told = [{"prompt": case.entry["prompt"], "image": case.image, "right": case.right} for case, _ in wrong]
    (given.out / "cases.json").write_text(json.dumps({"pictures": len(cases), "wrong": told}, indent=1) + "\n")


def ways(steps: int) -> list[str]:
    """Two steps at a time the teacher's, then the first half, then all."""
    taken = [range(start, min(start + 2, steps)) for start in range(0, steps, 2)] + [range(steps // 2), range(steps)]
    return list(dict.fromkeys("".join(TEACHER if step in each else STUDENT for step in range(steps)) for each in taken))


def drawn(fields: Mapping[str, Field], detector: WorldDetector, cases: Sequence[Case],
          way: str) -> Iterator[tuple[Case, Image]]:
    """Each case, which learns whether it is right this way, and its picture."""
    levels = fields[STUDENT].levels
    for case in cases:
        prompt = case.entry["prompt"]
        texts = {letter: fields[letter].read([prompt]) for letter in set(way)}
        x = fields[STUDENT].noise([seed_of(prompt, case.image)])
        for step, letter in enumerate(way):
            x = x + (levels[step + 1] - levels[step]) * fields[letter].velocity(x, texts[letter], step)
        picture = fields[STUDENT].pictures(x)[0]
        sight = detector.look([picture])[0]
        if judge(case.entry, sight.found, sight.colours, detector.thresholds).correct:
            case.right.append(way)
        yield case, picture


if __name__ == "__main__":
    main()
