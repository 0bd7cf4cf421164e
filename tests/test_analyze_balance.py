# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from conftest import ROOT, load_cfg

from detectron2.modeling import build_model

from libra_d2.tools.analyze_balance import main

CONFIGS = ["libra_faster_rcnn_R_18_FPN", "libra_retinanet_R_18_FPN", "rpn_R_18_FPN"]


def arguments(config, synthetic, folder, *extra):
    return [
        *("--config-file", str(ROOT / f"configs/Demo/{config}.yaml"), "--num-images", "3"),
        *("--val-json", str(synthetic / "instances.json")),
        *("--val-images", str(synthetic / "images"), *extra),
        *("OUTPUT_DIR", str(folder), "INPUT.MIN_SIZE_TEST", "96", "MODEL.DEVICE", "cpu"),
    ]


@pytest.mark.parametrize("config", CONFIGS)
def test_page(config, synthetic, tmp_path):
    """What the model has is in numbers, figures and page."""
    cfg = load_cfg(ROOT / f"configs/Demo/{config}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 4
    weights = tmp_path / "weights.pth"
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    main(arguments(config, synthetic, tmp_path, "MODEL.WEIGHTS", str(weights)))
    numbers = json.loads((tmp_path / "balance/balance.json").read_text())
    expected = {"num_images", "features"}
    expected |= {"samples"} if "faster" in config else set()
    expected |= {"objective"} if "libra" in config else set()
    assert set(numbers) == expected
    page = (tmp_path / "balance/index.html").read_text()
    pictures = {path.stem for path in (tmp_path / "balance").glob("*.png")}
    assert page.count("<img") == len(pictures)
    assert {"levels", "heat_maps", "losses"} <= pictures


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "MODEL.WEIGHTS: name the weights"),
        (["--num-images", "0"], "--num-images is 0: use 1 or more"),
        (["MODEL.WEIGHTS", "none.pth"], "none.pth"),
    ],
)
def test_errors(extra, message, synthetic, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments(CONFIGS[0], synthetic, tmp_path, *extra))
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert message in line
