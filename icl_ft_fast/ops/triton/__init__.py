"""The ops in Triton, a module an op: importing one loads triton."""
