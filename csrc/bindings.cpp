// The Python module crossmask.kernels._C. Importing it runs the static registrations of the kernels (STABLE_TORCH_LIBRARY_IMPL);
// the schemas are defined once, in Python, next to the plain-PyTorch kernels that run where this module is missing.
#include <Python.h>

#ifndef CROSSMASK_CUDA_ARCHITECTURES
#define CROSSMASK_CUDA_ARCHITECTURES ""
#endif

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Native kernels of crossmask.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() {
  PyObject* self = PyModule_Create(&module);
  // the CUDA architectures compiled in; empty: CPU kernels only
  if (self != nullptr && PyModule_AddStringConstant(self, "CUDA_ARCHITECTURES", CROSSMASK_CUDA_ARCHITECTURES) < 0) {
    Py_DECREF(self);
    return nullptr;
  }
  return self;
}
