"""The kernels inside other people's projects: each module here imports its library, and only when it is used."""
