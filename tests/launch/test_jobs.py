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


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_passes():
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# The parts of JobSet's schema (jobset.x-k8s.io/v1alpha2) and of Kubernetes' that the manifest uses: of each object its
# required fields and the others, which the API server would refuse if misspelt.
SCHEMA = {
    "": ("apiVersion kind metadata spec", ""),
    "metadata": ("name", ""),
    "spec": ("replicatedJobs", "failurePolicy"),
    "spec.failurePolicy": ("", "maxRestarts"),
    "spec.replicatedJobs": ("name template", "replicas"),
    "spec.replicatedJobs.template": ("spec", "metadata"),
    "spec.replicatedJobs.template.spec": ("template", "parallelism completions backoffLimit"),
    "spec.replicatedJobs.template.spec.template": ("spec", "metadata"),
}
POD = "spec.replicatedJobs.template.spec.template.spec"
SCHEMA |= {
    POD: ("containers", "restartPolicy nodeSelector volumes"),
    f"{POD}.nodeSelector": ("cloud.google.com/gke-tpu-accelerator cloud.google.com/gke-tpu-topology", ""),
    f"{POD}.containers": ("name image", "workingDir command resources volumeMounts"),
    f"{POD}.containers.resources": ("", "limits"),
    f"{POD}.containers.resources.limits": ("google.com/tpu", ""),
    f"{POD}.containers.volumeMounts": ("name mountPath", ""),
    f"{POD}.volumes": ("name persistentVolumeClaim", ""),
    f"{POD}.volumes.persistentVolumeClaim": ("claimName", ""),
}
NUMBERS = {"maxRestarts", "replicas", "parallelism", "completions", "backoffLimit", "google.com/tpu"}


def assert_valid(node, path=""):
    required, others = (fields.split() for fields in SCHEMA[path])
    assert set(required) <= set(node) <= {*required, *others}, path
    for name, value in node.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                assert_valid(one, f"{path}.{name}".lstrip("."))
            else:
                assert type(one) is (int if name in NUMBERS else str), f"{path}.{name}"


def test_the_jobset_has_the_fields_of_the_schema():
    jobset = yaml.safe_load((ROOT / "launch" / "jobs" / "jobset.yaml").read_text())
    assert_valid(jobset)
    [job] = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")  # Kubernetes takes no other for a job
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    for named in (jobset["metadata"], job, *pod["containers"], *pod["volumes"]):
        assert re.fullmatch("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", named["name"])


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
