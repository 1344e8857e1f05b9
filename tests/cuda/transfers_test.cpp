// Batches over the bus, on a device that does everything late, beside what the CPU's kernels make of them.
#include "transfers.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "audit.h"
#include "core_test.h"
#include "dtype.h"
#include "fake_device.h"
#include "file.h"
#include "kernels.h"
#include "parcels.h"
#include "ring.h"
#include "run.h"

namespace core_test {
namespace {

using fastopt::Audit;
using fastopt::DType;
using fastopt::Job;
using fastopt::Parallel;
using fastopt::ReadError;
using fastopt::size_of;
using fastopt::cuda::DeviceError;
using fastopt::cuda::Direction;
using fastopt::cuda::Parcel;
using fastopt::cuda::Parcels;
using fastopt::cuda::Piece;
using fastopt::cuda::Ring;
using fastopt::cuda::TransferError;

constexpr int64_t kSlotBytes = 4096;
constexpr Direction kDirections[] = {Direction::ToDevice, Direction::ToHost};

const Parallel kThreads = run_on_std_threads;

std::vector<size_t> transfer(std::span<const Job> jobs, Direction direction, Ring& ring, FakeQueue& queue,
                             bool waits = true, int64_t threads = 2) {
  return fastopt::cuda::transfer(jobs, direction, ring, queue, {fastopt::kPortableKernels, threads, kThreads}, waits);
}

// Random bytes on one side, fresh memory on the other, both at an offset from an allocation's start; and what the CPU's
// kernels make of them.
class Batch {
 public:
  explicit Batch(uint32_t seed = 1) : random_(seed) {}

  void add(int64_t count, DType src, DType dst, int64_t src_offset = 0, int64_t dst_offset = 0) {
    srcs_.emplace_back(count * size_of(src), src_offset);
    dsts_.emplace_back(count * size_of(dst), dst_offset);
    expected_.emplace_back(count * size_of(dst));
    for (int64_t i = 0; i < count * size_of(src); ++i) {
      srcs_.back().data()[i] = static_cast<char>(random_());
    }
    jobs_.push_back({srcs_.back().data(), dsts_.back().data(), count, src, dst});
    fastopt::kPortableKernels.find(src, dst)(srcs_.back().data(), expected_.back().data(), count);
  }

  void add_any(int64_t jobs, int64_t largest) {
    const auto pairs = pairs_with_kernels();
    for (int64_t i = 0; i < jobs; ++i) {
      const auto& [src, dst] = pairs[random_() % pairs.size()];
      const auto most = static_cast<uint64_t>(random_() % 4 == 0 ? largest : largest / 50 + 1);
      add(static_cast<int64_t>(random_() % most), src, dst);
    }
  }

  void pin(FakeDevice& device, Direction direction) const {
    for (const Job& job : jobs_) {
      const bool to_device = direction == Direction::ToDevice;
      device.pin(static_cast<const char*>(to_device ? job.src : job.dst),
                 job.count * size_of(to_device ? job.src_dtype : job.dst_dtype));
    }
  }

  void spoil_sources() const {
    for (const Job& job : jobs_) {
      std::memset(const_cast<void*>(job.src), 0x55, static_cast<size_t>(job.count * size_of(job.src_dtype)));
    }
  }

  void clear_destinations() const {
    for (const Job& job : jobs_) {
      std::memset(job.dst, 0, bytes_written(job));
    }
  }

  void check_copied() const {
    for (size_t job = 0; job < jobs_.size(); ++job) {
      check(std::memcmp(dsts_[job].data(), expected_[job].data(), bytes_written(jobs_[job])) == 0, "job ", job, " of ",
            jobs_.size(), ", ", jobs_[job].count, " elements from dtype ", static_cast<int>(jobs_[job].src_dtype),
            " to ", static_cast<int>(jobs_[job].dst_dtype), ": not what the CPU makes of it");
    }
  }

  std::vector<Job>& jobs() { return jobs_; }
  const std::vector<Job>& jobs() const { return jobs_; }

 private:
  static size_t bytes_written(const Job& job) { return static_cast<size_t>(job.count * size_of(job.dst_dtype)); }

  std::mt19937 random_;
  std::vector<Buffer> srcs_;
  std::vector<Buffer> dsts_;
  std::vector<Buffer> expected_;
  std::vector<Job> jobs_;
};

// What is not pinned may be changed as soon as the call returns.
void check_transfer(const Batch& batch, Direction direction, Ring& ring, FakeDevice& device) {
  FakeQueue queue(device);
  check(transfer(batch.jobs(), direction, ring, queue).empty(), "a job was left under way");
  if (direction == Direction::ToDevice) {
    batch.spoil_sources();
    device.synchronize();
  }
  batch.check_copied();
  device.synchronize();
}

void check_all_slots_can_be_had(Ring& ring, FakeQueue& queue) {
  check(static_cast<int64_t>(ring.take(queue, ring.slots()).size()) == ring.slots(), "the ring has lost a slot");
}

void test_transfers_between_all_dtypes_at_every_alignment() {
  for (const Direction direction : kDirections) {
    FakeDevice device;
    Ring ring(kSlotBytes, 8);
    for (const auto& [src, dst] : pairs_with_kernels()) {
      Batch batch;
      for (int64_t offset = 0; offset < 16; ++offset) {
        const bool to_device = direction == Direction::ToDevice;
        for (const int64_t count : {0, 1, 7, 64, 65, 300}) {
          // The host's side stands anywhere, the device's at a multiple of its elements.
          batch.add(count, src, dst, to_device ? offset : offset * size_of(src),
                    to_device ? offset * size_of(dst) : offset);
        }
      }
      check_transfer(batch, direction, ring, device);
    }
  }
}

void test_transfers_larger_than_a_slot_and_than_the_ring() {
  for (const Direction direction : kDirections) {
    for (const int64_t slots : {1, 2, 8}) {
      FakeDevice device;
      Ring ring(kSlotBytes, slots);
      for (const auto& [src, dst] : pairs_with_kernels()) {
        Batch batch;
        for (const int64_t count : {511, 512, 513, 2'048, 4'097, 60'001}) {
          batch.add(count, src, dst);
        }
        check_transfer(batch, direction, ring, device);
      }
      check(device.calls("allocate") <= slots, device.calls("allocate"), " slots pinned of ", slots);
    }
  }
}

void test_transfers_of_any_mix() {
  for (uint32_t seed = 0; seed < 30; ++seed) {
    const Direction direction = kDirections[seed % 2];
    FakeDevice device(seed);
    Ring ring(kSlotBytes, 1 + seed % 9);
    Batch batch(seed);
    batch.add_any(150, 4'000);
    if (seed % 3 == 0) {
      batch.pin(device, direction);
    }
    check_transfer(batch, direction, ring, device);
  }
}

void test_nothing_to_transfer() {
  for (const Direction direction : kDirections) {
    FakeDevice device;
    Ring ring(kSlotBytes, 2);
    FakeQueue queue(device);
    transfer({}, direction, ring, queue);
    Batch empty;
    empty.add(0, DType::Float32, DType::BFloat16);
    transfer(empty.jobs(), direction, ring, queue);
    check(device.calls("allocate") == 0 && device.calls("copy") == 0, "something was done for nothing");
  }
}

void test_a_million_small_jobs_share_transfers() {
  constexpr int64_t kJobs = 1'000'000;
  for (const Direction direction : kDirections) {
    FakeDevice device;
    Ring ring;
    std::vector<float> srcs(kJobs);
    std::vector<float> dsts(kJobs);
    std::vector<Job> jobs;
    for (size_t i = 0; i < kJobs; ++i) {
      srcs[i] = static_cast<float>(i);
      jobs.push_back({&srcs[i], &dsts[i], 4, DType::Byte, DType::Byte});
    }
    FakeQueue queue(device);
    transfer(jobs, direction, ring, queue);
    device.synchronize();
    check(srcs == dsts, "a job went astray");
    check(device.calls("copy") <= 70, device.calls("copy"), " transfers");
    check(device.calls("cast") == device.calls("copy"), device.calls("cast"), " batches of launches");
    check(device.calls("staging") == device.calls("cast"), "staging memory was asked for elsewhere");
  }
}

void test_the_fewer_bytes_travel() {
  for (const Direction direction : kDirections) {
    for (const auto& [src, dst] : pairs_with_kernels()) {
      for (const bool is_pinned : {false, true}) {
        FakeDevice device;
        Ring ring(kSlotBytes, 8);
        Batch batch;
        batch.add(16'384, src, dst);  // shares no transfer, or fills its slots
        if (is_pinned) {
          batch.pin(device, direction);
        }
        check_transfer(batch, direction, ring, device);
        const int64_t least = 16'384 * std::min(size_of(src), size_of(dst));
        check(device.bytes_over_the_bus() == least, device.bytes_over_the_bus(), " bytes and not ", least);
      }
    }
  }
}

void test_large_jobs_go_to_their_place_directly() {
  for (const Direction direction : kDirections) {
    FakeDevice device;
    Ring ring(kSlotBytes, 8);
    Batch batch;
    batch.add(3 * kSlotBytes, DType::Byte, DType::Byte);
    batch.add(kSlotBytes / 8, DType::Byte, DType::Byte);
    const bool to_device = direction == Direction::ToDevice;
    batch.add(3 * kSlotBytes / 2, to_device ? DType::Float32 : DType::BFloat16,
              to_device ? DType::BFloat16 : DType::Float32);
    check_transfer(batch, direction, ring, device);
    check(device.calls("cast") == 0 && device.calls("staging") == 0, "they went through staging memory");
  }
}

void test_pinned_memory_takes_no_slot() {
  for (const Direction direction : kDirections) {
    const bool to_device = direction == Direction::ToDevice;
    FakeDevice device;
    Ring ring(kSlotBytes, 8);
    Batch batch;
    batch.add(10 * kSlotBytes + 3, DType::Byte, DType::Byte);
    batch.add(5 * kSlotBytes + 3, to_device ? DType::BFloat16 : DType::Float32,
              to_device ? DType::Float32 : DType::BFloat16);
    batch.pin(device, direction);
    FakeQueue queue(device);
    const auto under_way = transfer(batch.jobs(), direction, ring, queue, /*waits=*/false);
    check(under_way == std::vector<size_t>({0, 1}), under_way.size(), " jobs are said to be under way");
    check(!device.is_idle(), "somebody waited for the device");
    device.synchronize();
    batch.check_copied();
    batch.clear_destinations();
    check(transfer(batch.jobs(), direction, ring, queue, /*waits=*/true).empty(), "a job was left under way");
    if (to_device) {
      batch.spoil_sources();
      device.synchronize();
    }
    batch.check_copied();
    check(device.calls("allocate") == 0, "a slot was pinned");
  }
}

void test_transfers_are_in_order_with_the_callers_stream() {
  for (const Direction direction : kDirections) {
    FakeDevice device;
    Ring ring(kSlotBytes, 4);
    Batch batch;
    batch.add_any(60, 3'000);
    Batch before(2);
    for (const Job& job : batch.jobs()) {
      before.add(job.count, job.src_dtype, job.dst_dtype);
    }
    FakeQueue queue(device);
    bool was_right = false;
    if (direction == Direction::ToHost) {  // what is fetched is what the caller's stream has still to write
      for (size_t i = 0; i < batch.jobs().size(); ++i) {
        const Job& job = batch.jobs()[i];
        const auto bytes = static_cast<size_t>(job.count * size_of(job.src_dtype));
        auto values = std::make_shared<std::vector<char>>(static_cast<const char*>(job.src),
                                                          static_cast<const char*>(job.src) + bytes);
        std::memset(const_cast<void*>(job.src), 0, bytes);
        queue.call_in_callers_stream(
            [=, &job] { std::copy(values->begin(), values->end(), static_cast<char*>(const_cast<void*>(job.src))); });
      }
    } else {  // what is sent is not overwritten by what the caller's stream had still to write
      queue.call_in_callers_stream([&] { batch.clear_destinations(); });
    }
    transfer(batch.jobs(), direction, ring, queue);
    queue.call_in_callers_stream([&] {
      batch.check_copied();
      was_right = true;
    });
    device.synchronize();
    check(was_right, "the caller's stream did not get to its end");
  }
}

void test_an_error_anywhere_leaves_the_ring_usable() {
  for (const Direction direction : kDirections) {
    for (const bool is_pinned : {false, true}) {
      for (const char* call : {"allocate", "copy", "cast", "record", "staging", "fork", "join", "work"}) {
        FakeDevice device;
        Ring ring(kSlotBytes, 4);
        bool has_failed = true;
        for (int64_t after = 0; has_failed; ++after) {
          check(after < 1'000, call, " never succeeds");
          Batch batch;
          batch.add(20'000, DType::Byte, DType::Byte);
          batch.add(7'000, DType::Float32, DType::BFloat16);
          batch.add(7'000, DType::BFloat16, DType::Float32);
          batch.add_any(20, 300);
          if (is_pinned) {
            batch.pin(device, direction);
          }
          device.fail(call, after);
          {
            FakeQueue queue(device);
            const int64_t before = device.calls(call);
            try {
              transfer(batch.jobs(), direction, ring, queue);
              // Work may fail behind a transfer to the device; and no new slot is one less.
              has_failed = std::string(call) != "allocate" && device.calls(call) - before > after;
              if (has_failed) {
                check(std::string(call) == "work" && direction == Direction::ToDevice, call, ": an error was lost");
              }
            } catch (const TransferError& error) {
              check(error.first_job <= error.last_job && error.last_job < batch.jobs().size(), "it names no job");
              check(device.is_idle(), call, ": something is under way after an error");
            } catch (const DeviceError&) {
              check(device.is_idle(), call, ": something is under way after an error");
            }
          }
          device.fail_no_more();
          device.synchronize();
          FakeQueue queue(device);
          check_all_slots_can_be_had(ring, queue);
          batch.clear_destinations();
          check_transfer(batch, direction, ring, device);
        }
      }
    }
  }
}

void test_an_error_names_its_jobs() {
  FakeDevice device;
  Ring ring(kSlotBytes, 4);
  Batch batch;
  for (int i = 0; i < 10; ++i) {
    batch.add(kSlotBytes, DType::Byte, DType::Byte);
  }
  FakeQueue queue(device);
  device.fail("copy", 6);
  std::optional<std::pair<size_t, size_t>> named;
  try {
    transfer(batch.jobs(), Direction::ToDevice, ring, queue);
  } catch (const TransferError& error) {
    check(std::string(error.what()) == "no copy", error.what());
    named = {error.first_job, error.last_job};
  }
  check(named == std::pair<size_t, size_t>(6, 6), "it names others than the one that failed");
}

// A file that holds these bytes.
class File {
 public:
  explicit File(std::span<const char> bytes) : stream_(std::tmpfile()) {
    check(stream_ != nullptr, "no file");
    check(write(descriptor(), bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()), "not written");
  }
  ~File() { std::fclose(stream_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int descriptor() const { return fileno(stream_); }

 private:
  std::FILE* stream_;
};

void test_transfers_out_of_files() {
  for (const bool is_short : {false, true}) {
    for (const DType dst : {DType::Float32, DType::BFloat16, DType::Float64}) {
      FakeDevice device;
      Ring ring(kSlotBytes, 4);
      Batch batch;
      const DType src = dst == DType::Float32 ? DType::Byte : DType::Float32;
      for (const int64_t count : {5, 400, 20'000}) {
        batch.add(count, src, dst == DType::Float32 ? DType::Byte : dst);
      }
      batch.pin(device, Direction::ToDevice);  // and still it is the file that is read
      std::vector<char> bytes(3);
      for (Job& job : batch.jobs()) {
        job.file_offset = static_cast<int64_t>(bytes.size());
        const char* values = static_cast<const char*>(job.src);
        bytes.insert(bytes.end(), values, values + job.count * size_of(src));
      }
      if (is_short) {
        bytes.pop_back();
      }
      const File file(bytes);
      for (Job& job : batch.jobs()) {
        job.file = file.descriptor();
      }
      batch.spoil_sources();
      FakeQueue queue(device);
      bool was_read = true;
      try {
        transfer(batch.jobs(), Direction::ToDevice, ring, queue);
      } catch (const ReadError&) {
        was_read = false;
        check(device.is_idle(), "something is under way after an error");
      }
      check(was_read != is_short, "a file that has ended was read, or one that has not was not");
      device.synchronize();
      if (was_read) {
        batch.check_copied();
      }
      check_all_slots_can_be_had(ring, queue);
    }
  }
}

void test_casts_to_the_device_are_audited() {
  for (const DType dst : {DType::BFloat16, DType::Float64}) {
    for (const bool is_pinned : {false, true}) {
      FakeDevice device;
      Ring ring(kSlotBytes, 4);
      Batch batch;
      for (const int64_t count : {10, 5'000}) {
        batch.add(count, DType::Float32, dst);
      }
      if (is_pinned) {
        batch.pin(device, Direction::ToDevice);
      }
      Audit audit;
      Audit expected;
      std::vector<char> unused(5'000 * 8);
      for (Job& job : batch.jobs()) {
        job.audit = &audit;
        fastopt::kPortableKernels.find_audited(DType::Float32, dst)(job.src, unused.data(), job.count, expected);
      }
      check_transfer(batch, Direction::ToDevice, ring, device);
      check(audit.values == 5'010 && audit.nan == expected.nan && audit.overflowed == expected.overflowed, audit.values,
            " values were looked at");
    }
  }
}

// No memory is that large; only its addresses are computed.
void test_parcels_beyond_32_bits() {
  constexpr int64_t kHuge = (int64_t{1} << 36) + 5;
  char* const src = reinterpret_cast<char*>(uintptr_t{1} << 44);
  char* const dst = reinterpret_cast<char*>(uintptr_t{1} << 45);
  const std::array<Job, 2> jobs{Job{src, dst, kHuge, DType::Float32, DType::BFloat16},
                                Job{src, dst, kHuge, DType::BFloat16, DType::Float32}};
  FakeDevice device;
  FakeQueue queue(device);
  char slot = 0;
  Parcels parcels(jobs, Direction::ToDevice, Ring::kSlotBytes, queue);
  std::array<int64_t, 2> done{};
  while (!parcels.is_done()) {
    const Parcel parcel = parcels.next();
    check(parcel.bytes <= Ring::kSlotBytes, "a parcel of ", parcel.bytes, " bytes");
    for (const Piece& piece : parcel.pieces) {
      check(piece.first == done[piece.job], "job ", piece.job, " goes on at ", piece.first);
      done[piece.job] += piece.count;
      const Job on_host = parcels.on_host(piece, &slot);
      check(on_host.src == src + piece.first * (piece.job == 0 ? 4 : 2), "read at another place");
      check(parcels.place_on_device(piece) == dst + piece.first * (piece.job == 0 ? 2 : 4), "written at another place");
    }
  }
  check(done[0] == kHuge && done[1] == kHuge, done[0], " and ", done[1], " elements");
}

void test_pieces_are_aligned_and_do_not_overlap() {
  FakeDevice device;
  FakeQueue queue(device);
  for (const Direction direction : kDirections) {
    Batch batch;
    batch.add_any(300, 1'500);
    Parcels parcels(batch.jobs(), direction, kSlotBytes, queue);
    while (!parcels.is_done()) {
      const Parcel parcel = parcels.next();
      check(!parcel.pieces.empty(), "a parcel is empty");
      int64_t end = 0;
      for (const Piece& piece : parcel.pieces) {
        check(piece.offset % 16 == 0 && piece.offset >= end && piece.count > 0, "a piece stands at ", piece.offset);
        end = piece.offset + parcels.bytes_of(piece);
        // Pieces begin where the whole is as aligned as at its start.
        check(piece.first % 64 == 0, "a job was cut at ", piece.first);
      }
      check(end == parcel.bytes && end <= kSlotBytes, "the last piece ends at ", end);
    }
  }
}

void test_threads_share_a_ring_of_any_size() {
  for (const int64_t slots : {1, 2, 5}) {
    FakeDevice device;
    Ring ring(kSlotBytes, slots);
    std::vector<std::string> errors(4);
    run_on_std_threads(4, [&](int64_t thread) {
      try {
        for (uint32_t round = 0; round < 4; ++round) {
          const Direction direction = kDirections[(static_cast<uint32_t>(thread) + round) % 2];
          Batch batch(static_cast<uint32_t>(thread) * 100 + round);
          batch.add_any(40, 3'000);
          FakeQueue queue(device);
          transfer(batch.jobs(), direction, ring, queue, /*waits=*/true, /*threads=*/1);
          if (direction == Direction::ToDevice) {
            batch.spoil_sources();
            device.synchronize();
          }
          batch.check_copied();
        }
      } catch (const std::exception& error) {
        errors[static_cast<size_t>(thread)] = error.what();
      }
    });
    for (const std::string& error : errors) {
      check(error.empty(), error);
    }
    device.synchronize();
  }
}

}  // namespace

std::span<const Test> transfers_tests() {
  static constexpr std::array kTests{
      TEST(test_transfers_between_all_dtypes_at_every_alignment),
      TEST(test_transfers_larger_than_a_slot_and_than_the_ring),
      TEST(test_transfers_of_any_mix),
      TEST(test_nothing_to_transfer),
      TEST(test_a_million_small_jobs_share_transfers),
      TEST(test_the_fewer_bytes_travel),
      TEST(test_large_jobs_go_to_their_place_directly),
      TEST(test_pinned_memory_takes_no_slot),
      TEST(test_transfers_are_in_order_with_the_callers_stream),
      TEST(test_an_error_anywhere_leaves_the_ring_usable),
      TEST(test_an_error_names_its_jobs),
      TEST(test_transfers_out_of_files),
      TEST(test_casts_to_the_device_are_audited),
      TEST(test_parcels_beyond_32_bits),
      TEST(test_pieces_are_aligned_and_do_not_overlap),
      TEST(test_threads_share_a_ring_of_any_size),
  };
  return kTests;
}

}  // namespace core_test
