"""Checkpoints in Hugging Face's format: config.json and safetensors files.

    python -m fdp.models.hf import DIR --workdir=W [--config=configs/topicN.py --arm=a,b]
    python -m fdp.models.hf export W DIR2

`import` writes a workdir whose checkpoints hold the model as step 0, from which `fdp.train` goes
on. Its config is `--config` with the sizes and the routing of the checkpoint. With --experts=E and
--topk=K every FFN of a dense checkpoint becomes E experts that compute the same. `export` writes
the newest checkpoint of an arm. In a notebook: `model, variables = load(directory)`.

Every array is placed with its sharding as soon as it is read: the host holds one device's block of
one array, and reads the rows of the tensors that are in it."""

import functools
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("NPROC", "64")  # before jax is imported, as in fdp.train

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from fdp import checksums, command, config_file, sharding
from fdp import config as fdp_config
from fdp.checkpoint import Checkpoints, mute_orbax
from fdp.files import write_atomic
from fdp.keys import UserError
from fdp.mesh import AXES, make_mesh, use_virtual_devices
from fdp.models import hf_config, hf_files, hf_names, module
from fdp.models.hf_names import Naming
from fdp.models.moe import mixture
from fdp.models.shape import ModelShape
from fdp.models.transformer import Transformer, transformer
from fdp.parallel.masks import Mask
from fdp.state import ONCE, TrainState
from fdp.workdir import Record, bind, locked

ORIGIN = "huggingface.json"  # of a workdir: config.json, formats of the tensors, ignored fields
BUFFERS = ("rotary_emb.inv_freq",)  # tensors of old checkpoints that are no parameters
EXAMPLE = {
    "inputs": jax.ShapeDtypeStruct((1, 1), jnp.int32),
    "noise": jax.ShapeDtypeStruct((1,), jnp.float32),
}


# Reading
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is not loaded. config: its config.json. model: the values of our `model`
    section, those of the experts under "moe". tensors: by name; any mapping to arrays will do.
    ignored: fields of config.json that the user says to ignore."""

    config: Mapping[str, Any]
    model: Mapping[str, Any]
    tensors: Mapping[str, Any]
    ignored: tuple[str, ...] = ()

    @property
    def rules(self) -> dict[str, Naming]:
        """How its tensors make up our arrays, by path."""
        return hf_names.rules(self.config["model_type"], self.model)

    def upcycled(self, experts: int, topk: int) -> "Checkpoint":
        """The same with experts in place of FFNs (`hf_config.upcycled`)."""
        return replace(self, model=hf_config.upcycled(self.model, experts, topk))


def read(directory: str | Path, ignore: Collection[str] = ()) -> Checkpoint:
    """The checkpoint in `directory`. `ignore`: fields of config.json that do not matter.

    Raises UserError for files that are missing or damaged, and, naming all of them, for fields of
    config.json that are not supported and for tensors that are missing, unknown or of another
    shape."""
    config = hf_files.config_in(Path(directory))
    model = hf_config.section(config, ignore)
    found = Checkpoint(config, model, hf_files.tensors_in(Path(directory)), tuple(ignore))
    check(found.rules, found.tensors)
    return found


def check(rules: Mapping[str, Naming], tensors: Mapping[str, Any]) -> None:
    """Raises UserError, naming all of them, for tensors that are missing, unknown, of another shape
    or of a format that is no float of 16 or 32 bits."""
    want = {name: rule.tensor for rule in rules.values() for _, name in rule.names()}
    lines = [f"missing: {name} {want[name]}" for name in want.keys() - tensors.keys()]
    for name in tensors.keys() - want.keys():
        if not name.endswith(BUFFERS) and not _is_tied_head(name, tensors):
            lines.append(f"unknown: {name} {tuple(tensors[name].shape)}")
    for name in want.keys() & tensors.keys():
        tensor = tensors[name]
        if tuple(tensor.shape) != want[name]:
            lines.append(f"{name} has shape {tuple(tensor.shape)}, not {want[name]}")
        elif (kind := _kind(tensor)) not in hf_files.DTYPES:
            lines.append(f"{name} is {kind}, not {', '.join(hf_files.DTYPES)}")
    if lines:
        raise UserError(f"these tensors are not the model's: {'; '.join(sorted(lines))}")


def _kind(tensor: Any) -> str:
    """The format of a tensor: that of its file, or of an array."""
    if isinstance(tensor, hf_files.Tensor):
        return tensor.kind
    known = {np.dtype(dtype): kind for kind, dtype in hf_files.DTYPES.items()}
    return known.get(np.dtype(tensor.dtype), str(tensor.dtype))


def _is_tied_head(name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether a tensor that no rule asks for is a head that repeats the embedding."""
    table = tensors.get("model.embed_tokens.weight")
    if name != "lm_head.weight" or table is None or table.shape != tensors[name].shape:
        return False
    rows, many = table.shape[0], max(1, 2**24 // table.shape[1])
    boxes = [(slice(i, min(i + many, rows)), slice(None)) for i in range(0, rows, many)]
    return all(np.array_equal(tensors[name][box], table[box]) for box in boxes)


# Loading
# --------------------------------------------------------------------------------------------------


def configured(
    model: Mapping[str, Any], c: ml_collections.ConfigDict | None = None
) -> ml_collections.ConfigDict:
    """`c` with the `model` section of a checkpoint; by default the config of a causal model without
    a corpus. Raises UserError for values that do not fit each other."""
    if c is None:
        c = fdp_config.base()
        c.objective.name, c.data.source = "autoregressive", "blank"
        c.data.vocab = max(model["vocab"] - 2, 1)  # end of text and mask besides
    else:
        c = c.copy_and_resolve_references()
    step = c.model.moe.bias  # keeps its size where the checkpoint has a bias
    c.model.update({name: value for name, value in model.items() if name != "moe"})
    c.model.moe.update(model["moe"])
    if step and c.model.moe.bias:
        c.model.moe.bias = step
    fdp_config.validate(c)
    return c


def model_of(c: ml_collections.ConfigDict) -> Transformer:
    """The causal model of a config."""
    shape = ModelShape.of(c.model)
    moe = mixture(c.model.moe) if shape.experts else None
    return transformer(shape, Mask("causal", c.model.window), moe=moe)


def load(
    directory: str | Path,
    mesh: Mesh | None = None,
    c: ml_collections.ConfigDict | None = None,
    ignore: Collection[str] = (),
) -> tuple[Transformer, module.Variables]:
    """(model, variables) of a checkpoint on `mesh`, by default one device. `c`: for what a
    checkpoint does not say, such as the compute dtype. Raises UserError as `read` does, before
    anything is loaded."""
    found = read(directory, ignore)
    mesh = mesh or make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    model = model_of(configured(found.model, c))
    return model, place(model, found.rules, found.tensors, mesh)


def place(
    model: module.Module,
    rules: Mapping[str, Naming],
    tensors: Mapping[str, Any],
    mesh: Mesh,
    zero: int = 0,
    seed: int = 0,
) -> module.Variables:
    """The variables of `model` on `mesh`, read from `tensors` array by array. Arrays without a rule
    are drawn as at the start of training, such as routers of an upcycled model.

    Raises UserError for tensors that do not fit the rules, or rules that do not fit the model."""
    check(rules, tensors)
    shapes, specs, _ = module.abstract(model, EXAMPLE)
    shapes, specs = ({n: tree[n] for n in ("params", "state")} for tree in (shapes, specs))
    stored = sharding.stored_specs(shapes["params"], specs["params"], zero, mesh.shape["dp"])
    wanted, where = _paths(shapes), _paths(sharding.shardings(mesh, specs | {"params": stored}))
    _check_model(rules, wanted)
    fresh = _drawn(model, [path for path in wanted if path not in rules], where, seed)
    found = [
        _placed(rules[path], tensors, where[path]) if path in rules else fresh[path]
        for path in wanted
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _paths(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def _check_model(rules: Mapping[str, Naming], wanted: Mapping[str, Any]) -> None:
    """Raises UserError for rules of arrays that are not in `wanted`, or of another shape."""
    shapes = {path: tuple(wanted[path].shape) if path in wanted else None for path in rules}
    lines = [
        f"{path} {rule.shape}, where the model has {shapes[path] or 'nothing'}"
        for path, rule in rules.items()
        if rule.shape != shapes[path]
    ]
    if lines:
        raise UserError(f"the model is not the checkpoint's: {'; '.join(sorted(lines))}")


def _drawn(model: Any, paths: Sequence[str], where: Mapping[str, Any], seed: int) -> Any:
    """Initial values of the arrays at `paths`, in place on the mesh."""
    if not paths:
        return {}

    def build(key: jax.Array) -> dict[str, jax.Array]:
        example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), EXAMPLE)
        every = _paths(module.init(model, key, example))
        return {path: every[path] for path in paths}

    key, _ = jax.random.split(jax.random.key(seed))  # as at the start of training
    where = {path: where[path] for path in paths}
    return jax.jit(build, out_shardings=where, compiler_options=ONCE)(key)


def _placed(rule: Naming, tensors: Mapping[str, Any], where: Any) -> jax.Array:
    """One array; devices that hold the same block share one reading of it."""
    blocks: dict[Any, list[Any]] = {}
    for device, box in where.addressable_devices_indices_map(rule.shape).items():
        spans = tuple(s.indices(n)[:2] for s, n in zip(box, rule.shape, strict=True))
        blocks.setdefault(spans, []).append(device)
    pieces: list[jax.Array] = []
    for spans, devices in blocks.items():
        block = rule.read(tensors, tuple(slice(*span) for span in spans))
        placed = [jax.device_put(block, device) for device in devices]
        pieces += jax.block_until_ready(placed)  # or blocks would pile up on the host
    return jax.make_array_from_single_device_arrays(rule.shape, where, pieces)


# Exporting
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named(Mapping[str, np.ndarray]):
    """Our arrays as the tensors of a checkpoint, float32, each made when it is asked for.

    `arrays`: by path; jax.Arrays on any mesh of this process, or NumPy arrays."""

    rules: Mapping[str, Naming]
    arrays: Mapping[str, Any]

    @functools.cached_property
    def places(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(path of the array, index of its leading dims) of every tensor."""
        return {name: (p, at) for p, rule in self.rules.items() for at, name in rule.names()}

    def __getitem__(self, name: str) -> np.ndarray:
        path, at = self.places[name]
        return self.rules[path].write(_row(self.arrays[path], at))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _row(array: Any, at: tuple[int, ...]) -> np.ndarray:
    """`array[at]` on the host, from the shards that hold it."""
    if not isinstance(array, jax.Array):
        return np.asarray(array[at])
    if not array.is_fully_addressable:
        raise ValueError("devices of other processes hold the array: export its checkpoint instead")
    row = np.empty(array.shape[len(at) :], array.dtype)
    for shard in array.addressable_shards:
        spans = [s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True)]
        lead = tuple(i - a for i, (a, _) in zip(at, spans, strict=False))
        inside = all(a <= i < b for i, (a, b) in zip(at, spans, strict=False))
        if shard.replica_id == 0 and inside:
            row[tuple(slice(*span) for span in spans[len(at) :])] = shard.data[lead]
    return row


def export(
    directory: str | Path,
    arrays: Mapping[str, Any],
    config: Mapping[str, Any],
    kinds: Mapping[str, str] | None = None,
    ignore: Collection[str] = (),
    shard: int = hf_files.SHARD,
) -> None:
    """Write `arrays` as the checkpoint that a config.json describes (`hf_config.config_of` makes
    one), in files of at most `shard` bytes.

    `arrays`: {"params", "state"}, or arrays by path. `kinds`: formats of tensors by name, such as
    "BF16"; others are F32. The directory appears when it is complete. Raises UserError where arrays
    and config do not fit, CheckpointError where writing fails."""
    rules = hf_names.rules(config["model_type"], hf_config.section(config, ignore))
    arrays = _paths(arrays) if "params" in arrays else arrays
    _check_model(rules, {path: arrays[path] for path in rules if path in arrays})
    if rest := set(arrays) - rules.keys():
        raise UserError(
            f"these arrays have no name in a {config['model_type']} checkpoint: "
            f"{', '.join(sorted(rest))}"
        )
    named = Named(rules, arrays)
    shapes = {name: rules[path].tensor for name, (path, _) in named.places.items()}
    hf_files.write(Path(directory), named, shapes, config, kinds or {}, shard)


# Workdirs
# --------------------------------------------------------------------------------------------------


def save(
    workdir: Path,
    c: ml_collections.ConfigDict,
    source: Checkpoint,
    variables: module.Variables,
    arms: Sequence[str] = ("model",),
) -> None:
    """Bind `workdir` to the config and store the variables as step 0 of every arm and seed, from
    which training starts. Raises ValueError where the workdir belongs to another config or holds
    checkpoints, CheckpointError where writing fails."""
    folders = [workdir / "checkpoints" / f"{arm}-s{seed}" for arm in arms for seed in c.seeds]
    if taken := [str(folder) for folder in folders if _steps(folder)]:
        raise UserError(f"{', '.join(taken)} holds checkpoints: choose another --workdir")
    record = Record(fdp_config.flatten(c), fdp_config.digest(c))
    bind(workdir, record, c.checkpoint.allow_config_change)
    kinds = {name: kind for name, t in source.tensors.items() if (kind := _kind(t)) != "F32"}
    origin = {"config": dict(source.config), "kinds": kinds, "ignored": source.ignored}
    if all(path in source.rules for path in _paths(variables)):  # not with new routers
        write_atomic(workdir / ORIGIN, json.dumps(origin) + "\n")
    # What is not here, such as the state of the optimizer, is made when training starts.
    state = TrainState(None, None, variables["params"], None, None, variables["state"])
    for folder in folders:
        store = Checkpoints(folder, c.checkpoint.keep)
        try:
            store.save(0, state, {"source": source.config["model_type"]})
        finally:
            store.close()


def _steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


@dataclass(frozen=True)
class Stored(Mapping[str, np.ndarray]):
    """Parameters and model state of a checkpoint of ours, by path. Each is read when it is asked
    for, and only the last one is kept. `folder`: of a step."""

    folder: Path

    @functools.cached_property
    def _reader(self) -> Any:
        mute_orbax()
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    @functools.cached_property
    def _shapes(self) -> dict[str, Any]:
        tree = self._reader.metadata(self.folder / "state").item_metadata.tree
        return _paths({"params": tree["params"], "state": tree.get("model", {})})

    @functools.cached_property
    def _last(self) -> dict[str, np.ndarray]:
        return {}

    def __getitem__(self, path: str) -> np.ndarray:
        if path not in self._last:
            self._last.clear()
            self._last[path] = self._read(path)
        return self._last[path]

    def _read(self, path: str) -> np.ndarray:
        item: Any = jax.ShapeDtypeStruct(tuple(self._shapes[path].shape), np.float32)
        how: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(path.replace("state/", "model/", 1).split("/")):
            item, how = {key: item}, {key: how}
        args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
        return jax.tree.leaves(self._reader.restore(self.folder / "state", args=args))[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def newest(workdir: Path, arm: str = "") -> Stored:
    """The newest checkpoint of an arm, such as "model-s0". Raises UserError, naming those that are
    there, unless it is the only one or named, and for one with changed bytes."""
    arms = sorted(path.name for path in (workdir / "checkpoints").glob("*") if _steps(path))
    if not arm and len(arms) == 1:
        arm = arms[0]
    if arm not in arms:
        raise UserError(
            f"{workdir} holds checkpoints of {', '.join(arms) or 'no arm'}: name one in --arm"
        )
    folder = workdir / "checkpoints" / arm
    newest = (folder / str(_steps(folder)[-1])).absolute()
    try:
        checksums.verify(newest)
    except checksums.Damaged as error:
        raise UserError(
            f"{newest} is damaged: {error}: move it away, and its elder is read"
        ) from error
    return Stored(newest)


# The command
# --------------------------------------------------------------------------------------------------


def declare(f: flags.FlagValues) -> None:
    """Define the flags of the command."""
    config_flags.DEFINE_config_file("config", None, "import: what it trains with", flag_values=f)
    flags.DEFINE_string("workdir", None, "import: where to", flag_values=f)
    flags.DEFINE_list("arm", [], "import: arms that start so; export: the arm", flag_values=f)
    flags.DEFINE_list("ignore", [], "fields of config.json that do not matter", flag_values=f)
    flags.DEFINE_integer("experts", 0, "import: experts in place of a dense FFN", flag_values=f)
    flags.DEFINE_integer("topk", 2, "import: experts of a token, with --experts", flag_values=f)
    flags.DEFINE_string("family", "", "export: model type of what was not imported", flag_values=f)


def run_import(directory: str, f: flags.FlagValues) -> None:
    """`import DIR`."""
    if not f.workdir:
        raise UserError("import writes a workdir: name it in --workdir=W")
    source = read(directory, f.ignore)
    if f.experts:
        source = source.upcycled(f.experts, f.topk)
    c = configured(source.model, f.config)
    use_virtual_devices(math.prod(c.mesh.values()))
    mesh, workdir = make_mesh(c.mesh), command.folder(f.workdir)
    variables = place(model_of(c), source.rules, source.tensors, mesh, c.train.zero, c.seeds[0])
    arms = f.arm or ["model"]
    with locked(workdir):
        save(workdir, c, source, variables, arms)
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    print(f"read      {source.config['model_type']}, {count:,} parameters, of {directory}")
    print(f"wrote     step 0 of {', '.join(arms)} for seeds {list(c.seeds)} in {workdir}")
    if f.config is not None:
        before, after = (fdp_config.flatten(x.model) for x in (f.config, c))
        changed = [f"--config.model.{k}={v}" for k, v in after.items() if v != before[k]]
        print(f"train with the flags of this import and\n  {' '.join(changed)}")


def run_export(workdir: Path, directory: str, f: flags.FlagValues) -> None:
    """`export WORKDIR DIR`."""
    arrays = newest(workdir, ",".join(f.arm))
    flat = fdp_config.flatten(fdp_config.base())  # for keys that are newer than the workdir
    flat |= json.loads((workdir / "config.json").read_text())["config"]
    below = {name.removeprefix("model."): v for name, v in flat.items() if name[:6] == "model."}
    own = {name: v for name, v in below.items() if "." not in name}
    own["moe"] = {name[4:]: v for name, v in below.items() if name[:4] == "moe."}
    origin = workdir / ORIGIN
    found: dict[str, Any]
    if f.family or not origin.exists():
        if not f.family:
            raise UserError(f"{workdir} has no {ORIGIN}: name a model type, such as --family=llama")
        found = {"config": hf_config.config_of(f.family, own), "kinds": {}, "ignored": []}
    else:
        found = json.loads(origin.read_text())
        hf_config.check_same(found["config"], own, found["ignored"])
    export(directory, arrays, found["config"], found["kinds"], found["ignored"])
    print(f"wrote     {arrays.folder} as {found['config']['model_type']} to {directory}")
    if (name := flat["objective.name"]) != "autoregressive":
        print(f"note      objective.name={name!r} here, but models of this format are causal")


def run(words: Sequence[str], f: flags.FlagValues) -> None:
    """The command. Raises ValueError and OSError for what the user can fix."""
    match words:
        case ["import", directory]:
            run_import(directory, f)
        case ["export", workdir, directory]:
            run_export(command.folder(workdir, "WORKDIR"), directory, f)
        case _:
            raise UserError("say `import DIR --workdir=W` or `export WORKDIR DIR`")


def main(argv: Sequence[str]) -> None:
    """`run` on the process's flags."""
    run(argv[1:], flags.FLAGS)


if __name__ == "__main__":
    declare(flags.FLAGS)
    command.launch(main, config_file.parse_flags, ValueError)
