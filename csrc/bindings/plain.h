// Which tensors the native path may touch.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/python_headers.h>

#include <optional>

#include "../core/dtype.h"

namespace fastopt {

// Note [Plain tensors]
// The native path reads and writes memory directly, so it takes only tensors for which that is all there is to a copy:
// strided memory that is there, of the CPU or of a GPU, no pending conjugation or negation, no gradient to record, no
// batching or functionalisation by a transform. The dispatch keys say most of this at once: any key beyond those of an
// ordinary tensor of that device means that some handler wants to see the operation. Callers ask besides for the exact
// Python type, as a subclass may have its own ideas, and for dense strides where they need them. Whatever is not
// provably plain goes to the Python rules, which ask torch.
bool is_plain(const at::Tensor& tensor);       // on the CPU
bool is_plain_cuda(const at::Tensor& tensor);  // on a GPU

// Whether a plain tensor has nothing that a deep copy would carry over besides the storage: no gradient, no Python
// attributes, and a storage that no other tensor uses.
bool has_only_its_storage(PyObject* object, const at::Tensor& tensor);

// Whether every byte of its storage is the tensor's.
bool fills_its_storage(const at::Tensor& tensor);

// Whether no tensor but the one that this was asked of uses its storage.
bool is_the_only_user(const c10::Storage& storage);

// Whether the Python object of a tensor has attributes of its own.
bool has_attributes(PyObject* object);

// Note [Given memory]
// A tensor that is given away is released when it has been cast, and in a large batch part by part before that: input
// and output are then never in memory both. What is discarded must be nobody else's. So the Python object has one
// reference (the caller's to know) and no weak one, the tensor has one and its storage has one, and the storage was
// made by torch's own allocator: other memory (a numpy array, a mapped file, pinned or shared memory) may have readers
// that no count shows.
bool is_discardable(PyObject* object, const at::Tensor& tensor);

// The kernels' dtypes for a cast of plain tensors, where there is a kernel; equal dtypes are moved as bytes.
struct CastDTypes {
  DType src;
  DType dst;
};
std::optional<CastDTypes> cast_dtypes(at::ScalarType src, at::ScalarType dst);

}  // namespace fastopt
