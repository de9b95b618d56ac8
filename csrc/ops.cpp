// The operators' schemas, and the checks at their boundary. Kernels are in cpu/ and cuda/; fake kernels, autograd and
// pure-PyTorch references in gst_ext/.
#include <ATen/core/Tensor.h>
#include <Python.h>
#include <torch/library.h>

// The operators are found through torch.ops.gst; importing the module is only what loads them.
extern "C" PyObject* PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C"};
  return PyModule_Create(&module);
}

TORCH_LIBRARY(gst, m) {
  m.def("ebn_score(Tensor gamma, Tensor beta, bool signed=False) -> Tensor");
}
