#include "dtensors.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "checked.h"

namespace py = pybind11;

namespace fastopt {
namespace {

py::object attribute(py::handle object, PyObject* name) {
  return checked(PyObject_GetAttr(object.ptr(), name));
}

}  // namespace

DTensors::DTensors(const py::object& about) {
  if (!about.is_none()) {
    const py::tuple parts(about);
    type_ = parts[0];
    shard_ = parts[1];
    replicate_ = parts[2];
    new_ = parts[3];
    spec_of_ = parts[4];
  }
}

py::object DTensors::around(const py::object& part, py::handle like) {
  static PyObject* const spec_name = PyUnicode_InternFromString("_spec");
  static PyObject* const keywords = py::make_tuple("requires_grad").release().ptr();
  const at::ScalarType dtype = THPVariable_Unpack(part.ptr()).scalar_type();
  py::object given = attribute(like, spec_name);
  SpecPair& specs = specs_[{given.ptr(), dtype}];
  if (!specs.made) {
    specs.made = spec_of_(given, py::cast(dtype));
    specs.given = std::move(given);
  }
  PyObject* const arguments[] = {type_.ptr(), part.ptr(), specs.made.ptr(), Py_False};
  return checked(PyObject_Vectorcall(new_.ptr(), arguments, 3, keywords));
}

py::object DTensors::part(py::handle dtensor) const {
  static PyObject* const spec_name = PyUnicode_InternFromString("_spec");
  static PyObject* const placements_name = PyUnicode_InternFromString("placements");
  static PyObject* const part_name = PyUnicode_InternFromString("_local_tensor");
  const py::object placements = attribute(attribute(dtensor, spec_name), placements_name);
  if (!PyTuple_CheckExact(placements.ptr())) {
    return {};
  }
  for (const py::handle placement : py::reinterpret_borrow<py::tuple>(placements)) {
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(placement.ptr()));
    if (type != shard_.ptr() && type != replicate_.ptr()) {
      return {};
    }
  }
  py::object part = attribute(dtensor, part_name);
  return Py_TYPE(part.ptr()) == reinterpret_cast<PyTypeObject*>(THPVariableClass) ? part : py::object();
}

}  // namespace fastopt
