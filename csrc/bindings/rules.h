// The rules of a load by key, as `fastopt.policy.Policy` gives them.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <array>

namespace fastopt {

// The parameter that a value belongs to.
struct Target {
  at::ScalarType dtype = at::kFloat;
  c10::Device device = at::kCPU;
  bool is_hosted = false;  // its group wants `step` on its device
};

// `fastopt.policy.Rule`.
class Rule {
 public:
  enum class DType { Reference, Keep, FloatOnly, Step, Given };
  enum class Device { Param, Keep, Step, Given };

  Rule() = default;
  explicit Rule(const pybind11::tuple& rule);

  static Rule for_step();

  at::ScalarType dtype(at::ScalarType saved, const Target& target) const;
  c10::Device device(c10::Device saved, const Target& target) const;

 private:
  DType dtype_ = DType::Reference;
  Device device_ = Device::Param;
  at::ScalarType given_dtype_ = at::kFloat;
  c10::Device given_device_ = at::kCPU;
};

class Rules {
 public:
  // `rule_of`: state key, whether the own key is "step" -> rule; None for the reference's.
  explicit Rules(const pybind11::object& rule_of);

  bool are_reference() const { return rule_of_.is_none(); }

  // `is_step`: whether the tensor's own key is "step".
  const Rule& at(const pybind11::object& state_key, bool is_step);

 private:
  struct Known {
    pybind11::object key;
    Rule rule;
  };

  const Rule& ask(const pybind11::object& state_key);

  const pybind11::object& rule_of_;
  Rule reference_;
  Rule step_;
  std::array<Known, 16> known_;  // by identity: the keys of a state are few, and one object each
  size_t oldest_ = 0;
};

}  // namespace fastopt
