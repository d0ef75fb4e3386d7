"""Every notebook is stored with clean outputs, runs from top to bottom in this interpreter, and
asserts what it claims.

Refresh stored outputs with `jupyter nbconvert --to notebook --execute --inplace
notebooks/<name>.ipynb`."""

import ast
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIMEOUT = 300  # seconds a cell may take
MAX_BYTES = 300_000  # GitHub renders larger files slowly or not at all
MACHINE_PATH = re.compile(r"/home/|/root/|/Users/|/tmp/|/work/|[A-Z]:\\\\|site-packages")

# Names in the conditions that a notebook must assert, at the top level of a cell.
MUST_ASSERT = {
    "00_quickstart": ("mesh", "output_8", "grads_8", "losses_8", "counted", "formula"),
    "04_speculative_dlm": ("equal", "rounds", "taken", "fewest"),
    "08_zero_bubble": ("bubbles", "message", "found", "error", "piped"),
    "12_ttt_cp": ("bound", "recall", "sums", "once"),
    "02_moe_dlm": ("routed", "biased", "errors", "rows_sent", "counted", "formula", "dealt"),
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(nb: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def top_level_asserts(cell: nbformat.NotebookNode) -> list[ast.Assert]:
    """Asserts that run whenever the cell runs to its end: not inside a function, a branch or a
    loop.
    """
    return [node for node in ast.parse(cell.source).body if isinstance(node, ast.Assert)]


# Before each notebook: no names, devices or modules of the one before, and a working directory.
FRESH = """%reset -f
import os, sys
os.chdir({folder!r})
sys.path[:] = [p for p in sys.path if p not in (".", "..")]
for name in [m for m in sys.modules if m.split(".")[0] in ("fdp", "configs")]:
    del sys.modules[name]
if "jax" in sys.modules:
    import jax.extend
    jax.extend.backend.clear_backends()
    jax.config.update("jax_num_cpu_devices", -1)
%reset -f
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NotebookClient]:
    """One kernel of this interpreter for all notebooks, shut down after the last.

    The kernel is described in a folder of its own, so no kernel needs to be installed. It does not
    inherit the number of devices: a notebook asks for its own."""
    scratch = tmp_path_factory.mktemp("kernel")
    spec = scratch / "kernels" / "fdp-tests"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "tests", "language": "python"})
    )
    specs = KernelSpecManager(kernel_dirs=[str(spec.parent)], ensure_native_kernel=False)
    manager = AsyncKernelManager(kernel_name=spec.name, kernel_spec_manager=specs)
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "MPLBACKEND")
    }
    env["IPYTHONDIR"] = str(scratch)  # no start-up files of the user
    empty = nbformat.v4.new_notebook()
    resources = {"metadata": {"path": str(ROOT)}}
    made = NotebookClient(
        empty, km=manager, timeout=TIMEOUT, interrupt_on_timeout=True, resources=resources
    )
    made.execute(env=env)
    yield made
    made.nb = empty
    made.execute(cleanup_kc=True)


def execute(client: NotebookClient, nb: nbformat.NotebookNode, folder: Path) -> None:
    """Run every cell in `folder`; raises CellExecutionError with the cell's traceback."""
    fresh = nbformat.v4.new_code_cell(FRESH.format(folder=str(folder)))
    for client.nb in (nbformat.v4.new_notebook(cells=[fresh]), nb):
        client.execute()


@pytest.mark.fast
def test_there_are_notebooks() -> None:
    assert "00_quickstart" in {p.stem for p in NOTEBOOKS}
    assert MUST_ASSERT.keys() <= {p.stem for p in NOTEBOOKS}


@pytest.mark.fast
@each_notebook
def test_stored_outputs_are_complete_and_clean(path: Path) -> None:
    nb = read(path)
    nbformat.validate(nb)
    assert path.stat().st_size < MAX_BYTES, (
        f"{path.name} has {path.stat().st_size} bytes: lower the plots' dpi"
    )
    counts = [cell.execution_count for cell in code_cells(nb)]
    assert counts == list(range(1, len(counts) + 1)), (
        f"{path.name} was not stored after one run from top to bottom"
    )
    outputs = [output for cell in code_cells(nb) for output in cell.outputs]
    assert outputs, f"{path.name} is stored without outputs"
    complaints = [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not complaints, f"{path.name} stores errors or warnings: {complaints}"
    found = MACHINE_PATH.search(
        re.sub(r'"image/png": "[^"]*"', "", path.read_text(encoding="utf8"))
    )
    assert found is None, f"{path.name} holds a path of somebody's machine: {found.group()}"


@pytest.mark.fast
@each_notebook
def test_first_cell_makes_the_devices(path: Path) -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(code_cells(read(path))[0].source))
        if isinstance(node, ast.Call)
    ]
    assert "use_virtual_devices" in {
        call.func.id for call in calls if isinstance(call.func, ast.Name)
    }


@each_notebook
def test_notebook_runs_and_its_asserts_hold(path: Path, client: NotebookClient) -> None:
    nb = read(path)
    for cell in code_cells(nb):
        cell.execution_count, cell.outputs = None, []
    execute(client, nb, path.parent)
    cells = code_cells(nb)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    errors = [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not errors
    conditions = [ast.unparse(a.test) for cell in cells for a in top_level_asserts(cell)]
    assert conditions, f"{path.name} asserts nothing"
    missing = [
        w
        for w in MUST_ASSERT.get(path.stem, ())
        if not any(re.search(rf"\b{w}\b", c) for c in conditions)
    ]
    assert not missing, f"{path.name} no longer asserts anything about {missing}"


@each_notebook
def test_notebook_starts_from_the_root_too(path: Path, client: NotebookClient) -> None:
    nb = read(path)
    first = nb.cells.index(code_cells(nb)[0])
    nb.cells = [
        *nb.cells[: first + 1],
        nbformat.v4.new_code_cell("import jax\nassert jax.device_count() == 8"),
    ]
    execute(client, nb, ROOT)
    assert nb.cells[-1].execution_count == 2


@pytest.mark.fast
def test_only_asserts_that_must_run_count() -> None:
    source = "assert a\nif b:\n    assert c\ndef f():\n    assert d\n"
    found = top_level_asserts(nbformat.v4.new_code_cell(source))
    assert [ast.unparse(a.test) for a in found] == ["a"]
