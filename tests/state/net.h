/* Addresses and options of sockets, for all areas that have some. */
#ifndef NET_H
#define NET_H

#include "state.h"

#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

struct net_address {
	union {
		struct sockaddr any;
		struct sockaddr_in v4;
		struct sockaddr_in6 v6;
	};
	socklen_t bytes;
};

/* An address from text: of IPv6 where it has a colon. */
struct net_address net_address(const char *ip, int port);
/* Its text as `ip port`, in a static buffer of its own for some calls. */
const char *net_text(const struct net_address *address);
const char *net_name(int socket);
const char *net_peer(int socket);
int net_port(int socket);
int net_option(int socket, int level, int name);
void net_set(int socket, int level, int name, int value);
/* What poll says without waiting. */
int net_events(int socket);
/* `count` bytes of a pattern that begins at `from`: written, or read and compared. */
void net_send(int socket, unsigned from, size_t count);
void net_expect(int socket, unsigned from, size_t count);
/* Nothing can be read, and the connection is open. */
void net_expect_nothing(int socket);
void net_expect_end(int socket);

#endif
