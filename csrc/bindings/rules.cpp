#include "rules.h"

#include <torch/csrc/Device.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "device.h"

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
    return Rule::Device::Given;
  }
  const auto name = py::cast<std::string>(rule);
  if (name == "param") {
    return Rule::Device::Param;
  }
  if (name == "keep") {
    return Rule::Device::Keep;
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
    given_dtype_ = py::cast<at::ScalarType>(rule[0]);
  }
  if (device_ == Device::Given) {
    given_device_ = DeviceBatch::resolved(py::cast<at::Device>(rule[1]));
  }
}

Rule Rule::for_step() {
  Rule rule;
  rule.dtype_ = DType::Step;
  rule.device_ = Device::Step;
  return rule;
}

at::ScalarType Rule::dtype(at::ScalarType saved, const Target& target) const {
  const bool to_param = at::isFloatingType(target.dtype);
  switch (dtype_) {
    case DType::Reference:
      return to_param ? target.dtype : saved;
    case DType::FloatOnly:
      return to_param && at::isFloatingType(saved) ? target.dtype : saved;
    case DType::Given:
      return at::isFloatingType(saved) ? given_dtype_ : saved;
    case DType::Step:
      return target.is_hosted ? at::kFloat : saved;
    case DType::Keep:
      break;
  }
  return saved;
}

c10::Device Rule::device(c10::Device saved, const Target& target) const {
  switch (device_) {
    case Device::Param:
      return target.device;
    case Device::Step:
      return target.is_hosted ? target.device : saved;
    case Device::Given:
      return given_device_;
    case Device::Keep:
      break;
  }
  return saved;
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
