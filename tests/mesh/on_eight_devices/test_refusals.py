"""A mesh that does not fit is refused before anything is read: the model has no weights here, and there is no text."""

import pytest

from tests.launcher_module import run_main


@pytest.fixture(scope="module")
def without_weights(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "empty"
    path.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((folder / name).read_bytes())
    return path


@pytest.mark.parametrize("launcher", ["infer", "evaluate", "finetune"])
@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ({"expert": 3}, "mesh.expert = 3: expected a divisor of the model's 16 experts of a layer"),
        ({"tensor": 8}, "mesh.tensor = 8: expected a divisor of the model's 4 query heads"),
        ({"expert": 16}, "= 1 x 16 x 1 = 16 devices: expected at most 8"),
        ({"data": 2, "fsdp": 2, "expert_axes": ("data", "expert")}, "mesh.expert_axes"),
    ],
)
def test_a_mesh_that_does_not_fit_the_model_or_the_machine(without_weights, tmp_path, launcher, mesh, expected):
    with pytest.raises(ValueError, match=expected):
        run(launcher, without_weights, tmp_path, mesh, **{"policy.spec": "topk:3"})


@pytest.mark.parametrize(
    ("launcher", "setting"),
    [
        ("evaluate", "evaluation.batch_size"),
        ("train", "evaluation.batch_size"),
        ("train", "training.batch_size"),
        ("finetune", "evaluation.batch_size"),
        ("finetune", "training.batch_size"),
    ],
)
def test_a_batch_that_the_mesh_does_not_divide(without_weights, tmp_path, launcher, setting):
    with pytest.raises(ValueError, match=f"{setting} = 3: expected a multiple of mesh.data = 2"):
        run(launcher, without_weights, tmp_path, {"data": 2}, **{"policy.spec": "topk:3", setting: 3})


def run(launcher, model, out, mesh, **settings):
    settings |= {f"mesh.{name}": repr(one) for name, one in mesh.items()} | {"text.held_out": out / "missing"}
    if launcher == "train":
        settings |= {"policy.spec": "model"}
    else:
        settings |= {"model.path": model, "model.dtype": "auto"}
    run_main(launcher, settings, out, *(["--prompt=def"] if launcher == "infer" else []))
