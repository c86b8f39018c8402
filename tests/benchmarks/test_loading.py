"""The loading benchmark on a small checkpoint."""

import json

import pytest

from benchmarks import loading, results_schema


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_small_checkpoint(family, tmp_path, monkeypatch, capsys):
    small = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 97, "num_attention_heads": 4, "head_dim": 16}
    monkeypatch.setattr(loading, "_COMMON", loading._COMMON | small)
    monkeypatch.setitem(loading.FAMILIES, family, {"intermediate_size": 48, "moe_intermediate_size": 48})
    arguments = ["--families", family, "--gigabytes", "0.001", "--rounds", "2", "--folder", str(tmp_path)]
    assert loading.main([*arguments, "--json", str(tmp_path / "loading.json")]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == results_schema.read_results(tmp_path / "loading.json")
    assert [(row["family"], row["page_cache"]) for row in document["rows"]] == [(family, "dropped"), (family, "full")]
    for row in document["rows"]:
        assert 0.0005 < row["gigabytes"] < 0.002 and len(row["read_s"]) == len(row["load_s"]) == 2
        assert row["ratio"] == pytest.approx(row["load_gbps"] / row["read_gbps"])
    assert not list(tmp_path.glob("pipemoe_loading_*"))


def test_unknown_families_are_refused(capsys):
    with pytest.raises(SystemExit):
        loading.parse(["--families", "mixtral,nothing"])
    assert "--families nothing: choose from mixtral" in capsys.readouterr().err
