// DTensors, of which each process holds a part.
#pragma once

#include <ATen/core/ATen_fwd.h>
#include <c10/core/ScalarType.h>
#include <pybind11/pybind11.h>

#include <map>
#include <utility>

namespace fastopt {

// Note [DTensors]
// An operation on a DTensor goes through torch's dispatcher in Python, which takes many times as long as all else that
// a small one costs (benchmarks/questions/dtensors.py). A cast or a copy of one is that of the part which this process
// holds, under the same placements, unless a reduction of it is pending; so the part goes into the batch as any plain
// tensor, and a DTensor is made around the result.
class DTensors {
 public:
  // about: (the type, Shard, Replicate, the type's __new__, spec_of) or None, where there are no DTensors: `for_native`
  // of fastopt/dtensors.py. spec_of(spec, dtype) is the spec of a DTensor of another dtype.
  explicit DTensors(const pybind11::object& about);

  bool is_one(pybind11::handle object) const {
    return type_ && reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type_.ptr();
  }

  // The part of a DTensor that is here; null where an operation on it is not one on the DTensor.
  pybind11::object part(pybind11::handle dtensor) const;

  // A DTensor of a part, placed as another.
  pybind11::object around(const pybind11::object& part, pybind11::handle like);

 private:
  struct SpecPair {
    pybind11::object given;  // kept, as its address is what it is found by
    pybind11::object made;
  };

  pybind11::object type_;
  pybind11::object shard_;
  pybind11::object replicate_;
  pybind11::object new_;
  pybind11::object spec_of_;
  std::map<std::pair<PyObject*, at::ScalarType>, SpecPair> specs_;
};

}  // namespace fastopt
