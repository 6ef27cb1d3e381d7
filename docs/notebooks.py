"""The notebooks of examples/: run anew, and as pages of the site.

    python -P docs/notebooks.py

runs all of them and writes what their cells show into the files. What goes to standard error, bars
and messages of other packages, depends on the machine and is not kept.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat

EXAMPLES = Path(__file__).parents[1] / "examples"


def read(path: Path) -> Any:
    """Return a notebook as it is in its file."""
    return nbformat.read(path, as_version=4)


def run(path: Path, folder: Path) -> Any:
    """Return a notebook as it is after all its cells ran, in a folder.

    Args:
        path: the notebook; its file stays as it is.
        folder: where its kernel, of the Python that this is, starts.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; it has the cell and its traceback.
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = read(path)
    # Sockets are files here: two kernels that start at once cannot take one another's port. Their
    # paths may have some hundred characters, which those of tests' folders exceed.
    with tempfile.TemporaryDirectory() as own:
        manager = AsyncKernelManager(
            transport="ipc",
            connection_file=f"{own}/kernel",
            # No other folder: a kernel that somebody has installed may be of another Python.
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
        )
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=600,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        settings = {
            "IPYTHONDIR": own,  # neither settings nor history of whoever runs it
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore:IProgress not found",  # bars are text here
        }
        # cleanup_kc: it would leave a kernel running whose manager it did not make.
        client.execute(cleanup_kc=True, env=os.environ | settings)
    return notebook


def published(notebook: Any) -> Any:
    """Return a notebook that ran, without what is the machine's."""
    kept = nbformat.from_dict(notebook)
    kept.metadata.language_info = {"name": "python"}
    for cell in kept.cells:
        if cell.cell_type == "code":
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    return kept


def page(notebook: Any) -> str:
    """Return a notebook as a page in Markdown: text, code and what it showed."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        else:
            parts.append(f"```python\n{cell.source}\n```")
            parts += map(_shown, cell.outputs)
    return "\n\n".join(parts) + "\n"


def _shown(output: Any) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"].split())
        return f'<img src="data:image/png;base64,{picture}" alt="What the code above draws">'
    text = output.text if output.output_type == "stream" else data["text/plain"]
    return f"``` {{ .text .output }}\n{text.rstrip()}\n```"


def main() -> None:
    """Run all notebooks in place."""
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(published(run(path, Path(folder))), path)
        print(path.name)


if __name__ == "__main__":
    main()
