"""Reading recipes: types, ranges, contradictions, and errors that name the nearest key."""

import pytest

from danlu.training.recipe import differences, load_recipe, parse_recipe
from reference.training_support import TINY, values


def test_tables_are_typed_and_files_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "r.toml").write_text(
        'seed = 3\n[model]\npath = "danlu-nano"\n[data]\ntrain = ["a.txt", "python-stdlib"]\nlength = 8\n'
        '[optimizer]\nname = "lion"\n[training]\nsteps = 2\nbatch = 4\n'
    )
    read = load_recipe(tmp_path / "r.toml", ["training.batch=8", "schedule.kind=linear", "name=x y"])
    assert read.data.train.files == (str(tmp_path / "a.txt"), "python-stdlib")
    assert (read.seed, read.training.batch, read.schedule.kind, read.name) == (3, 8, "linear", "x y")
    assert read.optimizer.betas == (0.95, 0.98)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainng": {"steps": 1}}, "unknown key 'trainng'; the nearest known one is 'training'"),
        ({"training__stepz": 1}, "unknown key 'training.stepz'; the nearest known one is 'steps'"),
        ({"optimizer__lerning_rate": 1}, "unknown key 'optimizer.lerning_rate'; the nearest known one is 'learning_"),
        ({"optimizer": {"name": "tigr"}}, "adamw, lion, low_rank, muon, tiger, got 'tigr'; nearest 'tiger'"),
        ({"optimizer": {"learning_rate": 1.0}}, "optimizer.name is missing"),
        ({"data__train": {"file": "x"}}, "unknown key 'data.train.file'; the nearest known one is 'files'"),
        ({"data__train": {"split": "x"}}, "data.train must name files or a dataset"),
        ({"data__length": None}, "data.length is missing"),
        ({"training__steps": 0}, r"training.steps should be greater than or equal to 1, got 0"),
        ({"training__accumulation": 3}, "batch must be a multiple of accumulation=3, got 4"),
        ({"training__save_every": 3, "training__log_every": 2}, "save_every must be a multiple of log_every=2"),
        ({"model__path": "danlu-nano"}, "path .* or config .*, one of the two"),
        ({"model__config": {"hidden_size": 3}}, "config must name its model_type"),
        ({"model__lora": {"rank": 2}}, "start from a trained model"),
        ({"tokenizer": None}, "tokenizer must be given for a new model"),
        ({"tokenizer": {"path": "x", "train": {"vocab_size": 300}}}, "path or train, not both"),
        ({"data__packing": "documents", "data__positions": {"kind": "equal_mean"}}, "keep one of the two"),
        ({"data__packing": "none", "data__streaming": True}, "streaming packs rows"),
        ({"schedule": {"kind": "piecewise"}}, "knots and kind = 'piecewise' go together"),
        ({"schedule": {"decay": 3}}, "decay and kind = 'warmup_stable_decay' go together"),
        ({"schedule": {"kind": "piecewise", "knots": {"0": 1.0}, "warmup": 2}}, "warmup is one of the knots"),
        ({"optimizer": {"name": "tiger", "fold": True}}, "set training.max_grad_norm = 0"),
        ({"tasks": [{"name": "a", "train": "x"}, {"name": "a", "train": "y"}]}, "different names"),
        ({"tasks": [{"name": "main", "train": "x"}]}, "none may be 'main'"),
        ({"model": {"path": "danlu-nano", "ladder": {}}, "data__streaming": True}, "features of fixed rows"),
        ({"tasks": [{"name": "a", "train": "x"}], "loss": {"name": "emo"}}, "tasks use cross entropy"),
    ],
)
def test_wrong_recipes_are_refused_with_the_key_and_the_fix(changes, words):
    with pytest.raises(ValueError, match=words):
        parse_recipe(values(**changes))


def test_deepnorm_would_erase_a_trained_model():
    with pytest.raises(ValueError, match="would erase those of path"):
        parse_recipe(values(model={"path": "danlu-nano", "deepnorm": {}}))


def test_text_that_is_not_toml_and_settings_without_a_value_are_named(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("= 3")
    with pytest.raises(ValueError, match="bad.toml is not TOML"):
        load_recipe(path)
    path.write_text("name = 'x'")
    with pytest.raises(ValueError, match="--set must look like"):
        load_recipe(path, ["steps"])
    with pytest.raises(ValueError, match="name is not a table"):
        load_recipe(path, ["name.a=1"])


def test_differences_are_dotted_keys_and_leave_out_what_no_loss_depends_on():
    one = parse_recipe(TINY)
    other = parse_recipe(values(training__keep=7, training__steps=9, optimizer={"name": "lion"}))
    found = differences(one, other.fingerprint())
    assert "training.steps" in found
    assert "optimizer.name" in found
    assert "training.keep" not in found
    assert differences(one, parse_recipe(TINY).fingerprint()) == []
