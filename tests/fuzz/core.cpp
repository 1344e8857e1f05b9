// csrc/core under libFuzzer: `make fuzz`, where clang++ is. What the bytes of an input choose is held against a plain
// loop.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cpu_target.h"
#include "crc32.h"
#include "kernels.h"
#include "run.h"
#include "slab.h"
#include "torch_zip.h"

namespace {

using fastopt::DType;
using fastopt::Job;

void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "core: %s\n", what);
    std::abort();
  }
}

// Numbers and bytes out of an input; zeros when it is at its end.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint64_t number(uint64_t below) {
    uint32_t value = 0;
    take(&value, sizeof(value));
    return value % below;
  }

  void take(void* to, size_t bytes) {
    if (bytes == 0) {  // no bytes may be at no place
      return;
    }
    const size_t there = bytes < size_ ? bytes : size_;
    if (there > 0) {
      std::memcpy(to, data_, there);
    }
    std::memset(static_cast<char*>(to) + there, 0, bytes - there);
    data_ += there;
    size_ -= there;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

struct Tensor {
  std::unique_ptr<char[]> block;  // of exactly what is used
  size_t offset;
  size_t bytes;
  char* data() const { return block.get() + offset; }
};

Tensor make(size_t bytes, size_t offset) {
  return {std::make_unique<char[]>(offset + bytes), offset, bytes};
}

void fuzz_jobs(Input& input) {
  static const std::vector<std::string> targets = fastopt::cpu_targets();
  fastopt::use_cpu_target(targets[input.number(targets.size())]);
  const fastopt::Kernels& kernels = fastopt::kernels();
  constexpr DType kinds[]{DType::Float32, DType::BFloat16, DType::Float16, DType::Float64, DType::Byte};
  std::vector<Tensor> from, to, expected;
  std::vector<fastopt::Audit> audits(1 + input.number(40));
  std::vector<Job> jobs;
  for (size_t i = 0; i < audits.size(); ++i) {
    DType src = kinds[input.number(5)];
    DType dst = src == DType::Byte ? src : kinds[input.number(4)];
    if (src == dst) {  // what needs no cast is moved as bytes
      src = dst = DType::Byte;
    }
    const auto count = static_cast<int64_t>(input.number(input.number(4) == 0 ? 40'000 : 70));
    from.push_back(make(static_cast<size_t>(count * fastopt::size_of(src)), input.number(9)));
    to.push_back(make(static_cast<size_t>(count * fastopt::size_of(dst)), input.number(9)));
    expected.push_back(make(to.back().bytes, 0));
    input.take(from.back().data(), from.back().bytes);
    const bool audited = src != DType::Byte && input.number(3) == 0;
    jobs.push_back({from.back().data(), to.back().data(), count, src, dst, audited ? &audits[i] : nullptr});
    fastopt::kPortableKernels.find(src, dst)(from.back().data(), expected.back().data(), count);
  }
  const auto parallel = [](int64_t tasks, const std::function<void(int64_t)>& task) {
    std::vector<std::jthread> threads;
    for (int64_t i = 0; i < tasks; ++i) {
      threads.emplace_back(task, i);
    }
  };
  fastopt::run(jobs, kernels, 1 + static_cast<int64_t>(input.number(3)), parallel);
  for (size_t i = 0; i < jobs.size(); ++i) {
    require(jobs[i].audit == nullptr || jobs[i].audit->values == jobs[i].count, "an audit has missed values");
    // Which NaN it is, is left open.
    const auto size = static_cast<size_t>(fastopt::size_of(jobs[i].dst_dtype));
    for (size_t at = 0; at < to[i].bytes; at += size) {
      if (std::memcmp(to[i].data() + at, expected[i].data() + at, size) != 0) {
        double values[2]{};
        const char* const places[2]{to[i].data() + at, expected[i].data() + at};
        for (int side = 0; side < 2; ++side) {
          if (jobs[i].dst_dtype == DType::Float64 || jobs[i].dst_dtype == DType::Byte) {
            std::memcpy(&values[side], places[side], size);
          } else {
            fastopt::kPortableKernels.find(jobs[i].dst_dtype, DType::Float64)(places[side], &values[side], 1);
          }
        }
        require(jobs[i].dst_dtype != DType::Byte && values[0] != values[0] && values[1] != values[1],
                "a kernel's result is not that of the portable one");
      }
    }
  }
}

void fuzz_slabs(Input& input) {
  struct Taken {
    fastopt::Piece piece;
    size_t bytes;
    unsigned char content;
  };
  std::vector<Taken> all;
  {
    fastopt::SlabArena arena;
    for (uint64_t left = 1 + input.number(200); left > 0; --left) {
      if (!all.empty() && input.number(3) == 0) {
        std::swap(all[input.number(all.size())], all.back());
        fastopt::release(all.back().piece.owner);
        all.pop_back();
        continue;
      }
      const size_t bytes = 1 + input.number(input.number(50) == 0 ? fastopt::SlabArena::kLargestPiece : 4'000);
      const size_t alignment = size_t{1} << input.number(7);
      all.push_back({arena.take(bytes, alignment), bytes, static_cast<unsigned char>(left)});
      require(reinterpret_cast<uintptr_t>(all.back().piece.data) % alignment == 0, "a piece is not aligned");
      std::memset(all.back().piece.data, all.back().content, bytes);
    }
  }
  for (const Taken& taken : all) {
    const auto* bytes = static_cast<const unsigned char*>(taken.piece.data);
    require(bytes[0] == taken.content && bytes[taken.bytes - 1] == taken.content, "pieces overlap");
    fastopt::release(taken.piece.owner);
  }
}

void fuzz_checksums(Input& input) {
  std::vector<unsigned char> data(input.number(3'000));
  input.take(data.data(), data.size());
  uint32_t bitwise = 0xffffffffu;
  for (const unsigned char byte : data) {
    bitwise ^= byte;
    for (int bit = 0; bit < 8; ++bit) {
      bitwise = (bitwise >> 1) ^ (0xedb88320u & (0u - (bitwise & 1u)));
    }
  }
  const size_t cut = data.empty() ? 0 : input.number(data.size() + 1);
  const uint32_t first = fastopt::crc32(0, data.data(), cut);
  require(fastopt::crc32(first, data.data() + cut, data.size() - cut) == ~bitwise, "a checksum is another");
}

void fuzz_layout(Input& input) {
  fastopt::ZipLayout layout(1 + input.number(300), uint64_t{1} << input.number(8));
  uint64_t end = 0;
  for (uint64_t left = input.number(60); left > 0; --left) {
    const std::string name(1 + input.number(200), 'n');
    uint64_t size = input.number(5'000'000'000);
    size = size << input.number(20);
    const auto place = layout.next(name, size);
    require(place.header == end && place.data > place.header, "records overlap");
    require(layout.end() >= place.data + size, "a record ends before its data");
    end = layout.end();
  }
  require(layout.file_size() > end, "there is no room for the directory");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  switch (input.number(4)) {
    case 0:
      fuzz_jobs(input);
      break;
    case 1:
      fuzz_slabs(input);
      break;
    case 2:
      fuzz_checksums(input);
      break;
    default:
      fuzz_layout(input);
  }
  return 0;
}
