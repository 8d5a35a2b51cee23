// Parses /proc/buddyinfo: how much memory the Linux kernel has free in large pages.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace cpc {

// Returns the number of free 2 MiB pages, or -1 where the text has another form. The text has one line per memory zone:
// "Node 0, zone Normal", then the number of free blocks of 4 KiB times each power of two.
inline int64_t free_huge_pages_of(const char* text) {
  constexpr int kOrder = 9, kWords = 4;
  int64_t pages = 0;
  for (const char* at = text; *at != 0;) {
    for (int word = 0; word < kWords; ++word) {
      while (*at == ' ') ++at;
      while (*at != 0 && *at != ' ' && *at != '\n') ++at;
    }
    for (int order = 0; *at != 0 && *at != '\n'; ++order) {
      char* behind = nullptr;
      const int64_t blocks = std::strtoll(at, &behind, 10);
      if (behind == at) return -1;
      if (order >= kOrder) pages += blocks << (order - kOrder);
      for (at = behind; *at == ' ';) ++at;
    }
    if (*at == '\n') ++at;
  }
  return pages;
}

}  // namespace cpc
