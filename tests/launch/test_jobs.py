"""The job files: their syntax, and the commands in them."""

import pathlib
import re
import shutil
import subprocess

import pytest
import yaml

from moe_jax.config import gin

ROOT = pathlib.Path(__file__).parents[2]
JOBS = sorted((ROOT / "launch" / "jobs").iterdir())
SCRIPTS = [path for path in JOBS if path.suffix == ".sh"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_a_script(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_jobset_is_yaml_with_as_many_pods_as_the_slice_has_hosts():
    jobset = yaml.safe_load((ROOT / "launch" / "jobs" / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert (
        spec["parallelism"]
        == spec["completions"]
        == rows * columns // container["resources"]["limits"]["google.com/tpu"]
    )
    assert container["command"][:2] == ["python", "launch/train.py"] and "--coordinator=auto" in container["command"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_the_settings_of_a_job_are_possible(path):
    text = path.read_text()
    [name] = re.findall(r"--config[= ](\S+)", text)
    config = gin.read_config(ROOT / name, re.findall(r"--set[= ](\S+)", text))
    config.mesh.require_divides(config.architecture)
    config.mesh.require_batch("training.batch_size", config.training.batch_size)
    config.mesh.require_devices(16, processes=16)
    assert "--coordinator=auto" in text
