// The Python module crossmask.kernels._C. Importing it runs the static registrations of the kernels (STABLE_TORCH_LIBRARY_IMPL);
// the schemas are defined once, in Python, next to the plain-PyTorch kernels that run where this module is missing.
#include <Python.h>

#include "ema.h"

#ifndef CROSSMASK_CUDA_ARCHITECTURES
#define CROSSMASK_CUDA_ARCHITECTURES ""
#endif

static PyObject* hold_tensors(PyObject* /*self*/, PyObject* /*none*/) {
  crossmask::hold_tensors();
  Py_RETURN_NONE;
}

static PyObject* release_tensors(PyObject* /*self*/, PyObject* /*none*/) {
  crossmask::release_tensors();
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {{"hold_tensors", hold_tensors, METH_NOARGS, "ema_update_ keeps its references to tensors ..."},
                                  {"release_tensors", release_tensors, METH_NOARGS, "... and lets them go, in one piece."},
                                  {nullptr, nullptr, 0, nullptr}};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Native kernels of crossmask.", -1, functions, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() {
  PyObject* self = PyModule_Create(&module);
  // the CUDA architectures compiled in; empty: CPU kernels only
  if (self != nullptr && PyModule_AddStringConstant(self, "CUDA_ARCHITECTURES", CROSSMASK_CUDA_ARCHITECTURES) < 0) {
    Py_DECREF(self);
    return nullptr;
  }
  return self;
}
