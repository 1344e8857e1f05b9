#include "rules.h"

#include <torch/csrc/Device.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

namespace py = pybind11;

namespace fastopt {
namespace {

Rule::DType dtype_rule(const std::string& name) {
  if (name == "reference") {
    return Rule::DType::Reference;
  }
  if (name == "keep") {
    return Rule::DType::Keep;
  }
  if (name == "float-only") {
    return Rule::DType::FloatOnly;
  }
  TORCH_CHECK_VALUE(name == "step", "no rule for dtypes is called ", name);
  return Rule::DType::Step;
}

Rule::Device device_rule(const py::object& rule) {
  if (!py::isinstance<py::str>(rule)) {
    // "cpu:0" is another device to torch, and to move there a copy.
    return py::cast<at::Device>(rule) == at::Device(at::kCPU) ? Rule::Device::Cpu : Rule::Device::Other;
  }
  const auto name = py::cast<std::string>(rule);
  if (name == "param") {
    return Rule::Device::Param;
  }
  if (name == "keep") {
    return Rule::Device::Cpu;
  }
  TORCH_CHECK_VALUE(name == "step", "no rule for devices is called ", name);
  return Rule::Device::Step;
}

}  // namespace

Rule::Rule(const py::tuple& rule) : device_(device_rule(rule[1])) {
  if (py::isinstance<py::str>(rule[0])) {
    dtype_ = dtype_rule(py::cast<std::string>(rule[0]));
  } else {
    dtype_ = DType::Given;
    given_ = py::cast<at::ScalarType>(rule[0]);
  }
}

at::ScalarType Rule::dtype(at::ScalarType saved, const Target& target) const {
  const bool to_param = at::isFloatingType(target.dtype);
  switch (dtype_) {
    case DType::Reference:
      return to_param ? target.dtype : saved;
    case DType::FloatOnly:
      return to_param && at::isFloatingType(saved) ? target.dtype : saved;
    case DType::Given:
      return at::isFloatingType(saved) ? given_ : saved;
    case DType::Step:
      return target.is_hosted ? at::kFloat : saved;
    case DType::Keep:
      break;
  }
  return saved;
}

bool Rule::stays_on_cpu(const Target& target) const {
  switch (device_) {
    case Device::Param:
      return target.is_on_cpu;
    case Device::Step:
      return target.is_on_cpu || !target.is_hosted;
    case Device::Cpu:
      return true;
    case Device::Other:
      break;
  }
  return false;
}

Rules::Rules(const py::object& rule_of) : rule_of_(rule_of), step_(Rule::for_step()) {
  if (!are_reference()) {
    step_ = Rule(py::tuple(rule_of_("step", true)));
  }
}

const Rule& Rules::at(const py::object& state_key, bool is_step) {
  if (is_step) {
    return step_;
  }
  return are_reference() ? reference_ : ask(state_key);
}

const Rule& Rules::ask(const py::object& state_key) {
  for (const Known& known : known_) {
    if (known.key.ptr() == state_key.ptr()) {
      return known.rule;
    }
  }
  Known& known = known_[oldest_];
  oldest_ = (oldest_ + 1) % known_.size();
  known = {state_key, Rule(py::tuple(rule_of_(state_key, false)))};
  return known.rule;
}

}  // namespace fastopt
