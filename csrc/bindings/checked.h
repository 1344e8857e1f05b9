// What the C API of Python returns, with its errors thrown.
#pragma once

#include <pybind11/pybind11.h>

namespace fastopt {

// A new reference. Throws what Python has raised where there is none.
inline pybind11::object checked(PyObject* object) {
  if (object == nullptr) {
    throw pybind11::error_already_set();
  }
  return pybind11::reinterpret_steal<pybind11::object>(object);
}

// Throws what Python has raised where the status is not zero.
inline void check(int status) {
  if (status != 0) {
    throw pybind11::error_already_set();
  }
}

}  // namespace fastopt
