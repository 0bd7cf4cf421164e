# SPDX-License-Identifier: Apache-2.0
"""demo/fine_tuning.ipynb, executed with smaller settings."""

import nbformat
from conftest import ROOT
from nbclient import NotebookClient

SMALLER = """
EPOCHS, NUM_IMAGES, NUM_PRETRAINING_IMAGES = 1, 10, 6
OPTIONS = (
    "INPUT.MIN_SIZE_TRAIN (64,96) INPUT.MIN_SIZE_TEST 96 SOLVER.IMS_PER_BATCH 2 "
    "DATALOADER.NUM_WORKERS 0 MODEL.FPN.OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.FC_DIM 32 "
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0"  # there are detections, whatever the weights
)
"""


def test_fine_tuning(tmp_path, monkeypatch):
    """All cells run; the model that is exported finds what the predictor finds."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "demo/fine_tuning.ipynb", as_version=4)
    cells = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cells += [] if "install" in tags else [cell]
        cells += [nbformat.v4.new_code_cell(SMALLER)] if "parameters" in tags else []
    notebook.cells = cells
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    output = tmp_path / "output/notebook"
    names = ("pretrained.pth", "fine_tuning/model_best.pth", "fine_tuning/curves.png", "model.onnx")
    assert all((output / name).is_file() for name in (*names, "onnx.png"))
