"""Replacing functions of another project: known versions only, everywhere they are held, and back again."""

import functools
import importlib
import sys
from pathlib import Path

import pytest

from fastedit.integrations.patching import NotCovered, Point, accelerate_project
from fastedit.integrations.sources import hashes_in, source_hash


def root(module):
    return Path(module.__file__).parent


def known_of(name, folder):
    return {
        f"{name}.{file}:{function}": {digest: "v1"}
        for file in ("solver", "main")
        for function, digest in hashes_in((folder / name / f"{file}.py").read_text()).items()
    }


def start(name, known, points=None, **options):
    """Replace ``solve``, ``execute`` and ``Editor.step`` by functions that answer with a text."""

    def make(context):
        def ours(*args, **kwargs):
            if args[-1] == 13:
                raise NotCovered("13 is not covered")
            return f"ours {args[-1]} {sorted(context.fix)}"

        return ours

    if points is None:
        points = [
            Point(f"{name}.solver:solve", make, uses=("scale",)),
            Point(f"{name}.main:execute", make, uses=("solve", "solver.solve.scale")),
            Point(f"{name}.main:Editor.step", make),
        ]
    return accelerate_project("a test", points, known, root=root, **options)


@pytest.mark.parametrize("loaded_before", [True, False], ids=["loaded-before", "loaded-after"])
def test_functions_are_replaced_wherever_they_are_held_and_put_back(project, loaded_before):
    name = project()
    known = known_of(name, project.folder)
    if loaded_before:
        main, solver = (importlib.import_module(f"{name}.{each}") for each in ("main", "solver"))
        originals = main.solve, main.TABLE["solve"], main.TABLE["pair"], main.execute, main.Editor.step
    report = start(name, known)
    main, solver = (importlib.import_module(f"{name}.{each}") for each in ("main", "solver"))

    assert (
        main.solve(3) == solver.solve(3) == main.TABLE["solve"](3) == main.TABLE["pair"][1](3) == "ours 3 []"
    )
    assert main.execute(5) == "ours 5 []"
    assert main.Editor().step(1) == "ours 1 []"
    assert set(report.replaced) == {
        f"{name}.{p}" for p in ("solver:solve", "main:execute", "main:Editor.step")
    }
    assert set(report.replaced.values()) == {"v1"}
    assert not report.skipped

    report.restore()
    assert main.solve(3) == solver.solve(3) == main.TABLE["pair"][1](3) == 6
    assert main.execute(5) == 11
    assert main.Editor().step(1) == 11
    if loaded_before:
        now = main.solve, main.TABLE["solve"], main.TABLE["pair"], main.execute, main.Editor.step
        assert all(a is b for a, b in zip(originals, now, strict=True))
    assert main.solve is solver.solve is main.TABLE["solve"] is main.TABLE["pair"][1]
    report.restore()  # a second time does nothing


def test_modules_that_are_loaded_after_restoring_are_left_alone(project):
    name = project()
    with start(name, known_of(name, project.folder)):
        pass
    assert importlib.import_module(f"{name}.main").execute(5) == 11


def test_a_module_that_took_the_replacement_by_value_is_put_back_too(project):
    name = project({"late.py": "from .main import execute\n"})
    report = start(name, known_of(name, project.folder))
    late = importlib.import_module(f"{name}.late")
    assert late.execute(1) == "ours 1 []"
    report.restore()
    assert late.execute(1) == 3


def test_input_that_is_not_covered_goes_to_the_original_and_is_counted(project):
    name = project()
    report = start(name, known_of(name, project.folder))
    main = importlib.import_module(f"{name}.main")
    assert main.solve(13) == main.solve(13) == 26
    assert main.solve(1) == "ours 1 []"
    assert report.fell_back == {f"{name}.solver:solve": {"13 is not covered": 2}}
    point = report.points[f"{name}.solver:solve"]
    assert (point.calls, sum(point.fell_back.values())) == (1, 2)
    assert "fell back" in str(report)
    assert report.as_dict()["fell_back"][f"{name}.solver:solve"]["reasons"] == {"13 is not covered": 2}
    report.restore()


def test_an_unknown_version_is_left_alone_and_named(project):
    name = project()
    known = known_of(name, project.folder)
    path = project.folder / name / "solver.py"
    path.write_text(path.read_text().replace("2 * x", "3 * x"))
    report = start(name, known)
    main = importlib.import_module(f"{name}.main")
    # scale is unknown: solve, which uses it, and execute, which uses solve, keep their originals
    assert main.solve(1) == 3
    assert main.execute(1) == 4
    assert main.Editor().step(1) == "ours 1 []"
    assert set(report.skipped) == {f"{name}.solver:solve", f"{name}.main:execute"}
    assert all(f"unknown version of {name}.solver:scale" in reason for reason in report.skipped.values())
    assert "left alone" in str(report)
    report.restore()


def test_a_function_that_is_not_there_is_named(project):
    name = project()
    report = start(name, {}, [Point(f"{name}.main:no_such", lambda context: print)])
    importlib.import_module(f"{name}.main")
    assert "no function no_such" in report.skipped[f"{name}.main:no_such"]
    report.restore()


def test_a_function_wrapped_by_somebody_else_is_left_alone(project):
    name = project()
    main = importlib.import_module(f"{name}.main")
    original = main.execute
    main.execute = functools.wraps(original)(lambda *args: original(*args))
    report = start(name, known_of(name, project.folder))
    assert "wrapped by somebody else" in report.skipped[f"{name}.main:execute"]
    report.restore()


def test_a_helper_replaced_by_somebody_else_later_makes_calls_fall_back(project):
    name = project()
    report = start(name, known_of(name, project.folder))
    main, solver = (importlib.import_module(f"{name}.{each}") for each in ("main", "solver"))
    solver.scale = lambda x: 100
    assert main.solve(1) == 100
    assert "scale was replaced by somebody else" in report.fell_back[f"{name}.solver:solve"]
    report.restore()


def test_another_project_of_the_same_name_is_left_alone(project):
    name = project()
    report = accelerate_project(
        "a test",
        [Point(f"{name}.main:execute", lambda context: print)],
        known_of(name, project.folder),
        root=lambda module: None,
    )
    assert importlib.import_module(f"{name}.main").execute(1) == 3
    assert not report.points
    report.restore()


def test_accelerating_twice_leaves_the_first_in_place(project):
    name = project()
    known = known_of(name, project.folder)
    importlib.import_module(f"{name}.main")
    first, second = start(name, known), start(name, known)
    assert set(second.skipped.values()) == {"it is replaced already"}
    second.restore()
    assert sys.modules[f"{name}.main"].execute(1) == "ours 1 []"
    first.restore()
    assert sys.modules[f"{name}.main"].execute(1) == 3


def test_corrections_reach_the_replacement_and_unknown_ones_are_refused(project):
    name = project()
    known = known_of(name, project.folder)
    with pytest.raises(ValueError, match=r"there is no wrong; there are right"):
        start(name, known, fix=["wrong"], fixes=["right"])
    report = start(name, known, fix=["right"], fixes=["right"])
    assert importlib.import_module(f"{name}.main").execute(1) == "ours 1 ['right']"
    report.restore()


def test_hashes_of_a_text_equal_those_of_the_loaded_functions(project):
    name = project(
        {
            "more.py": """
            import functools

            @functools.lru_cache(
                maxsize=None
            )
            def cached(a, /, b, *rest, c=1, **others):
                return a  # comments at the end of a line count

                # this one does not

            class Outer:
                @staticmethod
                def inside(x):
                    return x
            """
        }
    )
    module = importlib.import_module(f"{name}.more")
    found = hashes_in(Path(module.__file__).read_text())
    assert found == {"cached": source_hash(module.cached), "Outer.inside": source_hash(module.Outer.inside)}


def test_comments_and_blank_lines_do_not_make_another_version():
    one = "def f(x):\n    y = x\n    return y\n"
    assert hashes_in(one) == hashes_in("def f(x):\n\n    # why\n    y = x   \n    return y\n")
    assert hashes_in(one) != hashes_in(one.replace("return y", "return -y"))
    assert hashes_in(one) != hashes_in(one.replace("(x)", "(x, z=1)"))
