#include "plain.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/variable.h>

namespace fastopt {
namespace {

std::optional<DType> kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return DType::Float32;
    case at::kBFloat16:
      return DType::BFloat16;
    case at::kHalf:
      return DType::Float16;
    case at::kDouble:
      return DType::Float64;
    default:
      return std::nullopt;
  }
}

// Whether the storage holds every element: one that was resized away holds none, and torch has its own words for that.
bool fits_its_storage(const c10::TensorImpl& impl) {
  if (impl.numel() == 0) {
    return true;
  }
  int64_t last = impl.storage_offset() + impl.numel() - 1;
  if (!impl.is_non_overlapping_and_dense()) {
    last = impl.storage_offset();
    for (int64_t dim = 0; dim < impl.dim(); ++dim) {
      last += (impl.size(dim) - 1) * impl.stride(dim);
    }
  }
  return static_cast<size_t>(last + 1) * impl.itemsize() <= impl.unsafe_storage().nbytes();
}

// As CPython's own _PyObject_GET_WEAKREFS_LISTPTR, which is not public.
bool has_weak_references(PyObject* object) {
  const Py_ssize_t offset = Py_TYPE(object)->tp_weaklistoffset;
  return offset == 0 || *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset) != nullptr;
}

bool is_plain_among(const at::Tensor& tensor, c10::DispatchKeySet ordinary) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  // Raw bits: DispatchKeySet's own difference ignores the backend, and so would pass a meta tensor.
  if ((impl->key_set().raw_repr() & ~ordinary.raw_repr()) != 0 || !impl->has_storage() || !fits_its_storage(*impl)) {
    return false;
  }
  if (impl->requires_grad() && c10::GradMode::is_enabled()) {
    return false;
  }
  const torch::autograd::AutogradMeta* autograd = torch::autograd::impl::get_autograd_meta(tensor);
  return autograd == nullptr || autograd->fw_grad_ == nullptr;
}

}  // namespace

bool is_plain(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet ordinary({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                          c10::DispatchKey::AutocastCPU, c10::DispatchKey::ADInplaceOrView});
  return is_plain_among(tensor, ordinary);
}

bool is_plain_cuda(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet ordinary({c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCUDA,
                                          c10::DispatchKey::AutocastCUDA, c10::DispatchKey::ADInplaceOrView});
  return is_plain_among(tensor, ordinary);
}

// A storage that Python has looked at once, as torch.load and torch.save do, has a Python object from then on, which
// refers to it; nobody else refers to that object.
bool is_the_only_user(const c10::Storage& storage) {
  const size_t from_python = storage.unsafeGetStorageImpl()->pyobj_slot()->has_unique_reference() ? 1 : 0;
  return storage.use_count() == 1 + from_python;
}

bool has_attributes(PyObject* object) {
  PyObject** dict = _PyObject_GetDictPtr(object);
  return dict != nullptr && *dict != nullptr && PyDict_GET_SIZE(*dict) > 0;
}

bool has_only_its_storage(PyObject* object, const at::Tensor& tensor) {
  return !tensor.requires_grad() && !tensor.grad().defined() && is_the_only_user(tensor.storage()) &&
         !has_attributes(object);
}

bool fills_its_storage(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() && tensor.nbytes() == tensor.storage().nbytes();
}

bool is_discardable(PyObject* object, const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  return tensor.use_count() == 1 && tensor.weak_use_count() == 1 && !has_weak_references(object) &&
         is_the_only_user(storage) && storage.data_ptr().get_deleter() == c10::GetCPUAllocator()->raw_deleter();
}

std::optional<CastDTypes> cast_dtypes(at::ScalarType src, at::ScalarType dst) {
  if (src == dst) {
    return CastDTypes{DType::Byte, DType::Byte};
  }
  const auto from = kernel_dtype(src);
  const auto to = kernel_dtype(dst);
  if (!from || !to) {
    return std::nullopt;
  }
  return CastDTypes{*from, *to};
}

}  // namespace fastopt
