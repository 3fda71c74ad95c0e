"""How XLA compiles in the tests, and how many devices a process simulates."""

from importlib.metadata import version

# Nearly all the time of the suite is compilation of programs that run for milliseconds. Without
# LLVM's optimizations they are the same programs, made in half the time.
QUICK_COMPILATION = "--xla_backend_optimization_level=0"
# Two workers keep two cores busy: to compile the parts of a program at once only adds to that.
QUICK_COMPILATION += " --xla_cpu_parallel_codegen_split_count=1"
# Options of `Lowered.compile` for a program as users compile it, with XLA's own defaults. One test
# of the train step has them; no other program is run as XLA optimizes it.
AS_USERS: dict[str, int | bool] = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_parallel_codegen_split_count": 32,
}
if version("jaxlib").startswith("0.10."):
    # Nor are fused loops worth MLIR's optimizations, which take half of what is left. Later
    # releases do not have the flag, and XLA ends a process that names an unknown one.
    QUICK_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
    AS_USERS["xla_cpu_use_fusion_emitters"] = True


def xla_flags(devices: int = 1) -> str:
    """XLA_FLAGS of a process with so many simulated CPU devices."""
    return f"{QUICK_COMPILATION} --xla_force_host_platform_device_count={devices}"
