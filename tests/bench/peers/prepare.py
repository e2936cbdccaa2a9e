"""`python -m tests.bench.peers.prepare [ENGINE ...]`: installs engines and brings models into the forms that they read.

An engine that is not installed is left out of the comparison; a form that is missing is made when it is needed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path

from tests.bench.peers.registry import ENGINES, FORMS, HOME, Engine, models, programs
from tests.bench.peers.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[3]


def is_installed(engine: Engine) -> bool:
    """Whether its environment is there with all packages; the project's is."""
    return not engine.venv or _mark(engine).exists()


def install(engine: Engine) -> None:
    """Creates the environment of an engine.

    Raises:
        subprocess.CalledProcessError: a package could not be installed.
    """
    venv.create(engine.programs.parent, with_pip=True)
    pip = [str(engine.programs / "python"), "-m", "pip", "--disable-pip-version-check"]
    environment = {**os.environ, **dict(engine.build)}
    for packages in engine.packages:
        subprocess.run([*pip, "install", *packages.split()], env=environment, stdout=sys.stderr, check=True)
    if engine.unwanted:
        subprocess.run([*pip, "uninstall", "-y", *engine.unwanted], stdout=sys.stderr, check=True)
    _mark(engine).touch()


def _mark(engine: Engine) -> Path:
    """A file that is there when an environment is complete."""
    return engine.programs.parent / "complete"


def model(form: str, shape: str) -> Path:
    """Path of a model in a form; makes it if it is missing.

    Raises:
        subprocess.CalledProcessError: it could not be made.
    """
    path = models(shape) / form
    if not path.exists():
        recipe = FORMS[form]
        if recipe.venv:
            for source in ("bf16", "fp32"):
                model(source, shape)
        print(f"making {path}", file=sys.stderr)
        unfinished = path.with_name(f"{form}.unfinished")
        words = shlex.split(recipe.command.format(shape=shape, models=models(shape), target=unfinished))
        words[0] = str(programs(recipe.venv) / words[0])
        subprocess.run(words, cwd=ROOT, stdout=sys.stderr, check=True)
        unfinished.rename(path)
    return path


def main() -> None:
    """Installs what is asked for, and makes all that it needs of one shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", default=list(ENGINES), help=f"of {', '.join(ENGINES)}; all by default")
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    options = parser.parse_args()
    if unknown := set(options.engines) - set(ENGINES):
        parser.error(f"no such engine: {', '.join(unknown)}")
    for name in options.engines:
        engine = ENGINES[name]
        print(f"{name}: in {HOME}", file=sys.stderr)
        try:
            if not is_installed(engine):
                install(engine)
            for form in engine.forms.values():
                model(form, options.model)
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
