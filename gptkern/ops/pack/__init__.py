"""The kernels' machine code in a file, so that no compiler runs on the user's machine.

``gptkern pack`` compiles launches for GPUs that need not be there, and writes one file an architecture
(``file``, ``build``). At the first launch on a GPU the package's own files, or those that ``GPTKERN_PACK``
names, are looked up (``loader``), and ``gptkern._C`` launches what they hold through NVIDIA's driver. All
that they lack Triton compiles.
"""
