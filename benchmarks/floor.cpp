// The floor of a cast: the same bytes read, the same bytes written past the cache, into the same kind of memory, by as
// many threads; no tensors, no Python objects, no rounding. And that of a load from a file: the file read once, through
// small buffers, and as many bytes of fresh memory written as the results have. Built by floor.py for its machine.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

struct Move {
  const char* src;
  char* dst;
  int64_t count;
};

#if defined(__AVX2__)

using Register = __m256i;

Register load(const char* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

void stream(char* to, Register bits) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits);
}

void fence() {
  _mm_sfence();
}

#else

struct alignas(32) Register {
  char bytes[32];
  friend Register operator^(Register a, const Register& b) {
    for (int i = 0; i < 32; ++i) a.bytes[i] = static_cast<char>(a.bytes[i] ^ b.bytes[i]);
    return a;
  }
};

Register load(const char* from) {
  Register bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bits;
}

void stream(char* to, Register bits) {
  std::memcpy(to, &bits, sizeof(bits));
}

void fence() {}

#endif

// Reads `kSrc` registers and writes `kDst`, over and over: a ratio of element sizes. What it reads is fetched ahead into
// the second level of cache, by what was found to be fastest.
constexpr int64_t kAhead = 4 << 10;

template <int kSrc, int kDst>
void move_ratio(const char* src, char* dst, int64_t dst_bytes) {
  constexpr int64_t kStep = 32 * kDst;
  int64_t done = 0;
  for (; done + kStep <= dst_bytes; done += kStep, src += 32 * kSrc) {
    for (int i = 0; i < kSrc; i += 2) {
      __builtin_prefetch(src + 32 * i + kAhead, 0, 2);
    }
    Register bits[kSrc];
    for (int i = 0; i < kSrc; ++i) {
      bits[i] = load(src + 32 * i);
    }
    for (int i = kDst; i < kSrc; ++i) {
      bits[i % kDst] = bits[i % kDst] ^ bits[i];
    }
    for (int i = 0; i < kDst; ++i) {
      stream(dst + done + 32 * i, bits[i % kSrc]);
    }
  }
  fence();
  std::memset(dst + done, 0, static_cast<size_t>(dst_bytes - done));
}

using MoveFn = void (*)(const char*, char*, int64_t);

MoveFn mover(int64_t src_size, int64_t dst_size) {
  if (src_size == dst_size) return move_ratio<2, 2>;
  if (src_size == 2 * dst_size) return move_ratio<4, 2>;
  if (2 * src_size == dst_size) return move_ratio<1, 2>;
  return nullptr;
}

constexpr int64_t kChunk = 256 << 10;  // elements

// `work` in so many threads, this one among them.
template <typename Work>
void in_threads(int64_t threads, const Work& work) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) {
    others.emplace_back(work);
  }
  work();
  for (std::thread& other : others) {
    other.join();
  }
}

struct Piece {
  int fd;
  int64_t offset;
  int64_t size;
  char* dst;
  int64_t dst_size;
};

constexpr int64_t kPiece = 256 << 10;  // bytes: stays in the second level of cache

bool read_piece(const Piece& piece, char* buffer) {
  for (int64_t done = 0; done < piece.size;) {
    const ssize_t got = pread(piece.fd, buffer + done, static_cast<size_t>(piece.size - done), piece.offset + done);
    if (got <= 0) {
      return false;
    }
    done += got;
  }
  std::memset(piece.dst, 1, static_cast<size_t>(piece.dst_size));
  return true;
}

}  // namespace

// Moves `moves` tensors of `counts` elements, to destinations aligned to 32 bytes. False where there is no loop for
// the sizes.
extern "C" bool floor_move(const uint64_t* srcs, const uint64_t* dsts, const int64_t* counts, int64_t moves,
                           int64_t src_size, int64_t dst_size, int64_t threads) {
  const MoveFn move = mover(src_size, dst_size);
  if (move == nullptr) {
    return false;
  }
  std::vector<Move> chunks;
  for (int64_t i = 0; i < moves; ++i) {
    for (int64_t first = 0; first < counts[i]; first += kChunk) {
      chunks.push_back({reinterpret_cast<const char*>(srcs[i]) + first * src_size,
                        reinterpret_cast<char*>(dsts[i]) + first * dst_size, std::min(kChunk, counts[i] - first)});
    }
  }
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < chunks.size(); i = next++) {
      move(chunks[i].src, chunks[i].dst, chunks[i].count * dst_size);
    }
  };
  in_threads(threads, work);
  return true;
}

// Reads whole files once, and writes `dst_size` bytes at `dst` meanwhile. False where one cannot be read.
extern "C" bool floor_read(const char* const* paths, const int64_t* sizes, int64_t files, char* dst, int64_t dst_size,
                           int64_t threads) {
  int64_t total = 0;
  std::vector<int> fds;
  std::atomic<bool> ok{true};
  for (int64_t i = 0; i < files; ++i) {
    total += sizes[i];
    fds.push_back(open(paths[i], O_RDONLY | O_CLOEXEC));
    ok = ok && fds.back() >= 0;
  }
  std::vector<Piece> pieces;
  int64_t read = 0;
  const auto written = [&] { return static_cast<int64_t>(static_cast<double>(read) / total * dst_size); };
  for (int64_t i = 0; ok && i < files; ++i) {
    for (int64_t offset = 0; offset < sizes[i]; offset += kPiece) {
      const int64_t size = std::min(kPiece, sizes[i] - offset);
      const int64_t begin = written();
      read += size;
      pieces.push_back({fds[i], offset, size, dst + begin, written() - begin});
    }
  }
  std::atomic<size_t> next{0};
  in_threads(threads, [&] {
    std::vector<char> buffer(kPiece);
    for (size_t i = next++; ok && i < pieces.size(); i = next++) {
      if (!read_piece(pieces[i], buffer.data())) {
        ok = false;
      }
    }
  });
  for (const int fd : fds) {
    if (fd >= 0) {
      close(fd);
    }
  }
  return ok;
}

// Fresh memory in huge pages where the system has them; 0 where there is none.
extern "C" uint64_t floor_map(uint64_t bytes) {
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    return 0;
  }
#if defined(MADV_HUGEPAGE)
  madvise(mapped, bytes, MADV_HUGEPAGE);
#endif
  return reinterpret_cast<uint64_t>(mapped);
}

extern "C" void floor_unmap(uint64_t address, uint64_t bytes) {
  munmap(reinterpret_cast<void*>(address), bytes);
}
