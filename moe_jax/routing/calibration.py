"""Calibration of one trained model for policies: how its mixing weights decay, and how similar its experts are."""

import dataclasses
import io
import os
import pathlib
import zipfile
import zlib

import numpy as np

from moe_jax import files

NAME = "calibration.npz"  # in a model's folder
SAMPLED = 1024  # router weights kept to recognise the model
SAME = 2.0**-7  # relative difference of those that is accepted: more than rounding to any dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Measured on text by `study.calibrate`.

    Attributes:
        median_ratio_L: float32, for each MoE layer the median of w_i / w_1 over tokens and slots i = 2 to k.
        similarity_LEE: float32, the cosine between the outputs of two experts of a layer for the same tokens.
        router: `sample_of` the model's routers, to recognise the model.
    """

    median_ratio_L: np.ndarray
    similarity_LEE: np.ndarray
    router: np.ndarray

    def require(self, router_LED: np.ndarray) -> None:
        """Refuses any model but the one that was measured.

        Raises:
            ValueError: the model's routers have other weights.
        """
        other = sample_of(router_LED)
        if not np.linalg.norm(other - self.router) <= SAME * np.linalg.norm(self.router):
            raise ValueError(
                "policy.calibration is of another model: expected one that `launch/calibrate.py` wrote for this one"
            )


def sample_of(router_LED: np.ndarray) -> np.ndarray:
    """float32 [SAMPLED]: evenly spaced weights of all routers."""
    place = np.linspace(0, router_LED.size - 1, SAMPLED).astype(int)
    return np.asarray(router_LED.reshape(-1)[place]).astype(np.float32)


def find(path: str | os.PathLike, folder: str | os.PathLike) -> Calibration | None:
    """Reads the calibration at `path` or, if that is "", the one in a model's folder; None if there is none.

    Raises:
        ValueError: as `read`.
    """
    if path:
        return read(path)
    in_folder = pathlib.Path(folder) / NAME
    return read(in_folder) if in_folder.exists() else None


def read(path: str | os.PathLike) -> Calibration:
    """Reads a calibration written by `save`.

    Raises:
        ValueError: there is no such file, or it is not a calibration.
    """
    try:
        with np.load(io.BytesIO(pathlib.Path(path).read_bytes()), allow_pickle=False) as arrays:
            calibration = Calibration(
                np.float32(arrays["median_ratio_L"]), np.float32(arrays["similarity_LEE"]), np.float32(arrays["router"])
            )
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"policy.calibration = {os.fspath(path)!r}: no calibration ({error})") from error
    ratio_L, similarity_LEE = calibration.median_ratio_L, calibration.similarity_LEE
    if ratio_L.ndim != 1 or similarity_LEE.ndim != 3 or len(similarity_LEE) != len(ratio_L):
        raise ValueError(f"policy.calibration = {os.fspath(path)!r}: expected median_ratio_L and similarity_LEE")
    return calibration


def save(path: str | os.PathLike, calibration: Calibration) -> None:
    """Writes a calibration; similarities are rounded to float16."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        median_ratio_L=calibration.median_ratio_L,
        similarity_LEE=calibration.similarity_LEE.astype(np.float16),
        router=calibration.router,
    )
    files.write_atomically(path, buffer.getvalue())
