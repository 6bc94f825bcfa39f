"""A refused engine is followed by the next of the selector's ranking, each of them once."""

from __future__ import annotations

from dcqfa_ros.runtime.ranked_engines import RankedEngines

RANKING = "tensorrt/w8a8,tensorrt/fp32,onnxruntime/w8a8,onnxruntime/fp32"


def test_every_entry_comes_once_best_first() -> None:
    engines, asked = RankedEngines(), []
    engines.take(RANKING)
    while (best := engines.best()) is not None:
        asked.append("/".join(best))
        engines.refuse(asked[-1])
    assert ",".join(asked) == RANKING
    engines.take(RANKING)
    assert engines.best() == ("tensorrt", "w8a8")


def test_a_pinned_variant_or_runtime_is_kept() -> None:
    engines = RankedEngines()
    engines.take(RANKING)
    engines.refuse("tensorrt/w8a8")
    assert engines.best() == ("tensorrt", "fp32")
    assert engines.best(variant="w8a8") == ("onnxruntime", "w8a8")
    assert engines.best(runtime="onnxruntime") == ("onnxruntime", "w8a8")
    assert engines.best("w8a8", "tensorrt") is None


def test_what_is_not_ranked_changes_nothing() -> None:
    engines = RankedEngines()
    assert engines.best() is None
    engines.take("")
    engines.refuse("openvino/fp32")
    assert (engines.best(), engines.refused) == (None, set())


def test_what_follows_a_refusal_is_said() -> None:
    engines = RankedEngines()
    engines.take("tensorrt/w8a8,onnxruntime/w8a8")
    assert engines.after("openvino/w8a8", "auto", "auto", running="") == (None, "")
    assert engines.after("tensorrt/w8a8", "auto", "auto", running="onnxruntime/w8a8") == (
        None,
        "tensorrt/w8a8 was refused: onnxruntime/w8a8, the next of the selector's ranking, runs on",
    )
    assert engines.after("tensorrt/w8a8", "auto", "auto", running="")[0] == ("onnxruntime", "w8a8")
    best, text = engines.after("onnxruntime/w8a8", "auto", "auto", running="")
    assert best is None
    assert text.endswith("nothing of the selector's ranking is left to try, no engine runs")
