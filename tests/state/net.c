#include "net.h"

struct net_address net_address(const char *ip, int port)
{
	struct net_address address;
	memset(&address, 0, sizeof address);
	if (strchr(ip, ':')) {
		address.v6.sin6_family = AF_INET6;
		address.v6.sin6_port = htons((uint16_t)port);
		CHECK(inet_pton(AF_INET6, ip, &address.v6.sin6_addr) == 1, "%s is no address", ip);
		address.bytes = sizeof address.v6;
	} else {
		address.v4.sin_family = AF_INET;
		address.v4.sin_port = htons((uint16_t)port);
		CHECK(inet_pton(AF_INET, ip, &address.v4.sin_addr) == 1, "%s is no address", ip);
		address.bytes = sizeof address.v4;
	}
	return address;
}

const char *net_text(const struct net_address *address)
{
	static char buffer[8][INET6_ADDRSTRLEN + 8];
	static unsigned next;
	char *text = buffer[next++ % 8], ip[INET6_ADDRSTRLEN];
	bool v6 = address->any.sa_family == AF_INET6;
	inet_ntop(address->any.sa_family, v6 ? (const void *)&address->v6.sin6_addr : (const void *)&address->v4.sin_addr, ip, sizeof ip);
	snprintf(text, sizeof buffer[0], "%s %d", ip, ntohs(v6 ? address->v6.sin6_port : address->v4.sin_port));
	return text;
}

const char *net_name(int socket)
{
	struct net_address address = {.bytes = sizeof address};
	MUST(getsockname(socket, &address.any, &address.bytes));
	return net_text(&address);
}

const char *net_peer(int socket)
{
	struct net_address address = {.bytes = sizeof address};
	if (getpeername(socket, &address.any, &address.bytes) == -1)
		return "none";
	return net_text(&address);
}

int net_port(int socket) { return atoi(strchr(net_name(socket), ' ') + 1); }

int net_option(int socket, int level, int name)
{
	int value = 0;
	socklen_t bytes = sizeof value;
	MUST(getsockopt(socket, level, name, &value, &bytes));
	return value;
}

void net_set(int socket, int level, int name, int value) { MUST(setsockopt(socket, level, name, &value, sizeof value)); }

int net_events(int socket)
{
	struct pollfd fd = {.fd = socket, .events = POLLIN | POLLOUT | POLLPRI | POLLRDHUP};
	MUST(poll(&fd, 1, 0));
	return fd.revents;
}

static unsigned char pattern(unsigned position) { return (unsigned char)(position * 2654435761u >> 24); }

void net_send(int socket, unsigned from, size_t count)
{
	unsigned char buffer[4096];
	while (count) {
		size_t some = count < sizeof buffer ? count : sizeof buffer;
		for (size_t i = 0; i < some; i++)
			buffer[i] = pattern(from + (unsigned)i);
		ssize_t sent = MUST(send(socket, buffer, some, MSG_NOSIGNAL));
		from += (unsigned)sent;
		count -= (size_t)sent;
	}
}

void net_expect(int socket, unsigned from, size_t count)
{
	unsigned char buffer[4096];
	while (count) {
		struct pollfd fd = {.fd = socket, .events = POLLIN};
		CHECK(poll(&fd, 1, 20000) == 1, "%zu bytes do not come", count);
		ssize_t got = recv(socket, buffer, count < sizeof buffer ? count : sizeof buffer, 0);
		CHECK(got > 0, "%zu bytes are missing", count);
		for (ssize_t i = 0; i < got; i++)
			CHECK(buffer[i] == pattern(from + (unsigned)i), "byte %u is another", from + (unsigned)i);
		from += (unsigned)got;
		count -= (size_t)got;
	}
}

void net_expect_nothing(int socket)
{
	char byte;
	CHECK(recv(socket, &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN, "there is something to read");
}

void net_expect_end(int socket)
{
	char byte;
	CHECK(recv(socket, &byte, 1, 0) == 0, "the end is missing");
}
