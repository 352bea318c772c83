"""Every test runs on the CPU, with one compilation cache for the whole session and its subprocesses."""

import os
import tempfile
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="diffdistill-jax-cache-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

warnings.filterwarnings("ignore", category=DeprecationWarning, module="orbax|flax|tensorflow_datasets")
