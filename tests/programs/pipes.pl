#!/usr/bin/perl
# Perl: children behind pipes, which answer lines, and a child for each step, whose status is waited for.
use strict;
use warnings;
use Digest::SHA qw(sha256_hex);
use IO::Handle;

$| = 1;
my $work = ($ENV{WORK} // 100);
my $turns = int(2000 * $work / 100) || 1;
open my $random, '<', '/dev/urandom' or die;
read $random, my $bytes, 8;
my $nonce = unpack 'H*', $bytes;
print "nonce $nonce\n";

my $hups = 0;
$SIG{USR1} = sub { $hups++ };

my @workers;
for my $number (0 .. 3) {
    pipe my $question, my $asker or die;
    pipe my $answerer, my $answer or die;
    my $pid = fork // die "fork: $!";
    if (!$pid) {
        close $asker;
        close $answerer;
        $answer->autoflush(1);
        my $kept = $nonce . $number;
        while (my $line = <$question>) {
            chomp $line;
            my %words;
            $words{$_ % 977} .= chr(65 + $_ % 26) for 1 .. 20000;
            $kept = sha256_hex($line . substr($kept, -1) . join ',', map { "$_=$words{$_}" } sort keys %words);
            print {$answer} "$kept\n";
        }
        exit 7 + $number;
    }
    close $question;
    close $answer;
    $asker->autoflush(1);
    push @workers, { pid => $pid, ask => $asker, answers => $answerer, said => 'begin' };
}

my $digest = '';
for my $step (1 .. $turns) {
    for my $number (0 .. $#workers) {
        my $worker = $workers[$number];
        # The same for every start: the nonce is known to the workers, and is not part of what they answer.
        print { $worker->{ask} } "$step $number\n";
    }
    my $kid = fork // die "fork: $!";
    if (!$kid) {
        kill 'USR1', getppid;
        exit $step % 200;
    }
    for my $worker (@workers) {
        my $line = readline $worker->{answers};
        defined $line or die "differs: a worker is gone\n";
        chomp $line;
        length $line == 64 or die "differs: it said $line\n";
        $digest = sha256_hex($digest . $step . length $line);
    }
    waitpid($kid, 0) == $kid or die "differs: no child $kid\n";
    $? >> 8 == $step % 200 or die "differs: child of step $step ended with $?\n";
    print "ready\n" if $step == 1;
    print "step $step\n";
}
$hups == $turns or die "differs: $hups signals of $turns\n";
# All before the first is waited for: each holds the ends of those that were there before it.
close $_->{ask} for @workers;
for my $number (0 .. $#workers) {
    my $worker = $workers[$number];
    waitpid $worker->{pid}, 0;
    $? >> 8 == 7 + $number or die "differs: worker $number ended with $?\n";
}
print "OK $nonce $digest\n";
