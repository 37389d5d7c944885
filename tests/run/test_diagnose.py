"""The command that diagnoses a run's parents and leaves them to the run."""

import sys

from megajax.run import diagnose

EXPERIMENT = """
import megajax as mj


def get_config():
    return mj.Config(
        smoke=True,
        data=mj.DataConfig(limit=64),
        model=mj.ModelConfig(name="mlp", options={"hidden": (8,)}),
    )
"""


def test_parents_are_diagnosed_and_kept(tmp_path, capsys, monkeypatch):
    (tmp_path / "exp.py").write_text(EXPERIMENT)
    arguments = ["--config", str(tmp_path / "exp.py"), "--workdir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["megajax diagnose", *arguments])
    monkeypatch.setattr("megajax.run.cli.make_cores_devices", lambda: None)
    assert diagnose.main() == 0
    first = capsys.readouterr().out
    assert "midpoint aligned" in first
    assert first.splitlines()[-1].startswith("-> ")
    assert diagnose.main() == 0
    again = capsys.readouterr().out
    assert again.startswith("parents: taken from")
    assert first.splitlines()[-5:] == again.splitlines()[-5:]
    monkeypatch.setattr(sys, "argv", ["megajax diagnose"])
    assert diagnose.main() == 2
    assert "--config FILE is missing" in capsys.readouterr().err
