"""The real Triton server for tests: the binary inside the `nvidia-pytriton` wheel, with small Python models."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import uuid
from pathlib import Path

START_SECONDS = 60

# The wheel's stub was built against numpy 1 and finds strides and item sizes in the wrong place of numpy 2's
# arrays: so models here hand back the tensors that came, or go through DLPack, and never look into texts.
NUMPY_2 = """
class Unread(np.ndarray):
    def reshape(self, *shape):
        return self


def deserialize_bytes_tensor(encoded):
    return np.empty(0, object).view(Unread)
"""
HEAD = f"""import sys
sys.path.insert(0, {sysconfig.get_path("purelib")!r})
import numpy
import triton_python_backend_utils as backend


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

"""
SAME = """
    def answer(self, request):
        return backend.InferenceResponse(request.inputs())
"""
SUM = """
    def answer(self, request):
        a, b = (numpy.from_dlpack(one) for one in request.inputs())
        if a.sum() == 13:
            raise ValueError("thirteen brings no luck")
        return backend.InferenceResponse([backend.Tensor.from_dlpack("SUM", a + b)])
"""
MODELS = {
    "floats": (SAME, {"X": "FP32"}, {"X": "FP32"}, "-1, 2"),
    "halves": (SAME, {"X": "BF16"}, {"X": "BF16"}, "-1, 2"),
    "texts": (SAME, {"X": "STRING"}, {"X": "STRING"}, "-1"),
    "sum": (SUM, {"A": "INT64", "B": "INT64"}, {"SUM": "INT64"}, "-1"),
}


def write_models(folder: Path) -> None:
    """A repository of MODELS, and a backend folder that can run them."""
    wheel = Path(importlib.util.find_spec("pytriton").submodule_search_locations[0]) / "tritonserver"
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    (backend / "libtriton_python.so").symlink_to(wheel / "backends" / "python" / "libtriton_python.so")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(wheel / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
    utilities = (wheel / "backends" / "python" / "triton_python_backend_utils.py").read_text()
    (backend / "triton_python_backend_utils.py").write_text(utilities + NUMPY_2)
    for name, (code, inputs, outputs, dims) in MODELS.items():
        home = folder / "models" / name / "1"
        home.mkdir(parents=True)
        (home / "model.py").write_text(HEAD + code)
        tensors = [("input", inputs), ("output", outputs)]
        lines = [
            f'{side} [ {{ name: "{tensor}" data_type: TYPE_{datatype} dims: [{dims}] }} ]'
            for side, those in tensors for tensor, datatype in those.items()
        ]  # fmt: skip
        (home.parent / "config.pbtxt").write_text('backend: "python"\n' + "\n".join(lines) + "\n")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RealTriton:
    """One server process over a folder of `write_models`, on ports that stay the same when it comes back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.http_port, self.grpc_port = free_port(), free_port()
        self.http, self.grpc = f"http://127.0.0.1:{self.http_port}", f"grpc://127.0.0.1:{self.grpc_port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._memory = f"nexus_test_{uuid.uuid4().hex[:8]}"

    def start(self, *models: str) -> "RealTriton":
        site = Path(sysconfig.get_path("purelib"))
        libraries = f"{site / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
        command = [
            str(site / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
            "--model-repository", str(self.folder / "models"), "--backend-directory", str(self.folder / "backends"),
            "--model-control-mode", "explicit", "--allow-metrics", "false", "--exit-timeout-secs", "3",
            "--http-address", "127.0.0.1", "--http-port", str(self.http_port),
            "--grpc-address", "127.0.0.1", "--grpc-port", str(self.grpc_port),
            "--backend-config", f"python,shm-region-prefix-name={self._memory}",
            *(argument for model in models for argument in ("--load-model", model)),
        ]  # fmt: skip
        log = (self.folder / f"{self.http_port}.log").open("ab")
        environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        log.close()
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError((self.folder / f"{self.http_port}.log").read_text()[-4000:])
            time.sleep(0.05)
        return self

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.http}/v2/health/ready", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """End the server and the children it started, at once."""
        process, self.process = self.process, None
        if process is None:
            return
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for left in Path("/dev/shm").glob(f"{self._memory}*"):
            left.unlink()
